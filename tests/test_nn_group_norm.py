"""Group and instance norms as modules: everything torch.nn's do, on the backend under test."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch

import fastreg
from module_examples import assert_same_state, input_of, randomised

# What is above the kernels is the same for every backend: the others have it in a complete run.
pytestmark = pytest.mark.complete(backend=("reference", "triton", "cuda_sim"))

SHAPES = {
    "GroupNorm": [(3, 6), (2, 6, 7), (2, 6, 3, 5), (2, 6, 2, 3, 2)],
    "InstanceNorm1d": [(3, 6, 7)],
    "InstanceNorm2d": [(2, 6, 3, 5)],
    "InstanceNorm3d": [(2, 6, 2, 3, 2)],
}
INSTANCE_NORMS = tuple(SHAPES)[1:]
FORMATS = {"InstanceNorm2d": torch.channels_last, "InstanceNorm3d": torch.channels_last_3d}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"eps": 1e-3},
    {"affine": False},
    {"affine": True, "dtype": torch.float32},
]
RUNNING: list[dict[str, Any]] = [
    {"track_running_stats": True},
    {"track_running_stats": True, "momentum": 0.7, "affine": True},
    {"track_running_stats": True, "momentum": None},
]
each_module = pytest.mark.parametrize("name", SHAPES)
each_instance_norm = pytest.mark.parametrize("name", INSTANCE_NORMS)


def pair(name: str, device: str, **options: Any) -> tuple[Any, Any]:
    sizes = (3, 6) if name == "GroupNorm" else (6,)
    ours, torchs = (getattr(nn, name)(*sizes, **options) for nn in (fastreg.nn, torch.nn))
    return randomised(ours).to(device), randomised(torchs).to(device)


@each_module
def test_numbers_and_gradients_are_torchs(name: str, device: str) -> None:
    for options in OPTIONS:
        one, other = pair(name, device, **options)
        assert isinstance(one, type(other))
        assert one.extra_repr() == other.extra_repr()
        for shape in SHAPES[name]:
            input = input_of(shape, device)
            results = []
            for layer in (one, other):
                leaf = input.clone().requires_grad_()
                output = layer(input=leaf)
                wanted = (leaf, *layer.parameters())
                results.append((output, *torch.autograd.grad(output, wanted, output.detach().cos())))
            for found, expected in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@each_module
def test_the_constructor_is_torchs(name: str) -> None:
    ours, torchs = getattr(fastreg.nn, name), getattr(torch.nn, name)
    assert inspect.signature(ours) == inspect.signature(torchs)
    one, other = pair(name, "cpu", affine=True)
    assert str(one) == str(other)
    assert_same_state(one, other)


@each_instance_norm
@pytest.mark.parametrize("options", RUNNING, ids=str)
def test_three_batches_and_an_evaluation(name: str, options: dict[str, Any], device: str) -> None:
    one, other = pair(name, device, **options)
    (shape,) = SHAPES[name]
    for seed in range(3):
        input = input_of(shape, device, seed) * (seed + 1)
        torch.testing.assert_close(one(input), other(input), rtol=1e-5, atol=1e-5)
        assert_same_state(one, other)
    torch.testing.assert_close(one.eval()(input), other.eval()(input), rtol=1e-5, atol=1e-5)
    assert_same_state(one, other)


@each_instance_norm
def test_an_input_without_a_batch(name: str, device: str) -> None:
    one, other = pair(name, device, affine=True, track_running_stats=True)
    input = input_of(SHAPES[name][0], device)[0]
    torch.testing.assert_close(one(input), other(input), rtol=1e-5, atol=1e-5)
    assert_same_state(one, other)


@each_instance_norm
def test_torchs_error_texts_and_its_warning(name: str, device: str) -> None:
    (shape,) = SHAPES[name]
    one, other = pair(name, device, affine=True)
    other_channels = (shape[0], 5, *shape[2:])
    for wrong in ((2, 3, 4, 5, 6, 7), other_channels, (*shape[:2], *(1,) * len(shape[2:]))):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            other(input_of(wrong, device))
        with pytest.raises(type(expected.value)) as raised:
            one(input_of(wrong, device))
        assert str(raised.value) == str(expected.value)
    one, other = pair(name, device)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.testing.assert_close(
            one(input_of(other_channels, device)), other(input_of(other_channels, device))
        )
    assert len({str(each.message) for each in seen}) == 1
    assert len(seen) == 2


def test_group_norms_error_text() -> None:
    for kind in (fastreg.nn.GroupNorm, torch.nn.GroupNorm):
        with pytest.raises(ValueError, match=r"num_channels \(4\) must be divisible by num_groups \(3\)"):
            kind(3, 4)


@each_module
def test_state_dicts_copies_and_pickles(name: str, device: str) -> None:
    one, other = pair(name, device, affine=True)
    with torch.no_grad():
        one.weight.mul_(3)
    other.load_state_dict(one.state_dict(), strict=True)
    assert_same_state(one, other)
    input = input_of(SHAPES[name][-1], device)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert torch.equal(twin(input), one(input))


@each_module
def test_channels_last_is_kept(name: str, device: str) -> None:
    one, other = pair(name, device, affine=True)
    for shape in SHAPES[name]:
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
        if layout is not None:
            input = input_of(shape, device).to(memory_format=layout).requires_grad_()
            output, expected = one(input), other(input)
            assert output.is_contiguous(memory_format=layout)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
            (grad,) = torch.autograd.grad(output, input, torch.ones_like(expected).cumsum(1))
            assert grad.is_contiguous(memory_format=layout)


# --- norm and activation in one ---

ACTIVATIONS: list[tuple[Any, dict[str, Any] | None, torch.nn.Module]] = [
    (torch.nn.ReLU, None, torch.nn.ReLU()),
    (torch.nn.SiLU, None, torch.nn.SiLU()),
    (torch.nn.GELU, {"approximate": "tanh"}, torch.nn.GELU(approximate="tanh")),
    ("leaky_relu", {"negative_slope": 0.2}, torch.nn.LeakyReLU(0.2)),
    (None, None, torch.nn.Identity()),
]


@pytest.mark.parametrize(("layer", "options", "torchs"), ACTIVATIONS, ids=lambda each: str(each))
def test_group_norm_with_an_activation(
    layer: Any, options: Any, torchs: torch.nn.Module, device: str
) -> None:
    one = randomised(fastreg.nn.GroupNormAct(6, 3, act_layer=layer, act_kwargs=options)).to(device)
    other = randomised(torch.nn.GroupNorm(3, 6)).to(device)
    assert_same_state(one, other)
    for shape in SHAPES["GroupNorm"]:
        input = input_of(shape, device)
        torch.testing.assert_close(one(input), torchs(other(input)), rtol=1e-5, atol=1e-5)


def test_the_groups_of_group_norm_act() -> None:
    assert fastreg.nn.GroupNormAct(64).num_groups == 32
    assert fastreg.nn.GroupNormAct(24, group_size=4).num_groups == 6
    with pytest.raises(ValueError, match=r"num_channels \(24\) must be divisible by group_size \(5\)"):
        fastreg.nn.GroupNormAct(24, group_size=5)
    with pytest.raises(ValueError, match="GroupNormAct: 'Softmax' is none of the activations"):
        fastreg.nn.GroupNormAct(64, act_layer=torch.nn.Softmax)
    with pytest.raises(ValueError, match="GroupNormAct: unknown activation 'swish'"):
        fastreg.nn.GroupNormAct(64, act_layer="swish")
    assert "activation=identity" in str(fastreg.nn.GroupNormAct(64, apply_act=False))
    assert "negative_slope=0.2" in str(
        fastreg.nn.GroupNormAct(64, act_layer="leaky_relu", act_kwargs={"negative_slope": 0.2})
    )


def test_a_drop_layer_stands_between_norm_and_activation(device: str) -> None:
    class Negated(torch.nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return -input

    layer = randomised(fastreg.nn.GroupNormAct(6, 2, drop_layer=Negated)).to(device)
    input = input_of((2, 6, 4), device)
    expected = torch.relu(-torch.nn.functional.group_norm(input, 2, layer.weight, layer.bias))
    torch.testing.assert_close(layer(input), expected, rtol=1e-5, atol=1e-5)
