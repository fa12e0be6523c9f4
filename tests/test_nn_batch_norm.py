"""The batch norms as modules: everything torch.nn's do, on the backend under test."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch

import fastreg
from module_examples import assert_same_state, input_of, randomised

# What is above the kernels is the same for every backend: the others have it in a complete run.
pytestmark = pytest.mark.complete(backend=("reference", "triton", "cuda_sim"))

NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
SHAPES = {
    "BatchNorm1d": [(6, 5), (4, 5, 7)],
    "BatchNorm2d": [(4, 5, 3, 7), (3, 5, 1, 1)],
    "BatchNorm3d": [(2, 5, 3, 2, 4)],
}
FORMATS = {
    "BatchNorm2d": torch.channels_last,
    "BatchNorm3d": torch.channels_last_3d,
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"eps": 1e-3, "momentum": 0.7},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"dtype": torch.float32},
]
each_module = pytest.mark.parametrize("name", NAMES)


def pair(name: str, device: str, **options: Any) -> tuple[Any, Any]:
    ours, torchs = getattr(fastreg.nn, name)(5, **options), getattr(torch.nn, name)(5, **options)
    return randomised(ours).to(device), randomised(torchs).to(device)


@each_module
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_three_batches_and_an_evaluation_as_torchs(name: str, options: dict[str, Any], device: str) -> None:
    for shape in SHAPES[name]:
        one, other = pair(name, device, **options)
        assert isinstance(one, type(other))
        assert one.extra_repr() == other.extra_repr()
        for seed in range(3):
            input = input_of(shape, device, seed) * (seed + 1)
            torch.testing.assert_close(one(input), other(input), rtol=1e-5, atol=1e-5)
            assert_same_state(one, other)
        one.eval()
        other.eval()
        torch.testing.assert_close(one(input), other(input), rtol=1e-5, atol=1e-5)
        assert_same_state(one, other)


@each_module
def test_the_constructor_is_torchs(name: str) -> None:
    ours, torchs = getattr(fastreg.nn, name), getattr(torch.nn, name)
    assert inspect.signature(ours) == inspect.signature(torchs)
    assert str(ours(5)) == str(torchs(5))
    assert_same_state(ours(5), torchs(5))


@each_module
def test_torchs_error_texts(name: str, device: str) -> None:
    """The counter of batches has risen by then, as torch's has."""
    wrong = {"BatchNorm1d": (2, 5, 3, 3), "BatchNorm2d": (2, 5, 3), "BatchNorm3d": (2, 5, 3, 3)}[name]
    single = {"BatchNorm1d": (1, 5), "BatchNorm2d": (1, 5, 1, 1), "BatchNorm3d": (1, 5, 1, 1, 1)}[name]
    other_channels = tuple(4 if size == 5 else size for size in SHAPES[name][0])
    one, other = pair(name, device)
    for shape in (wrong, single, other_channels):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            other(input_of(shape, device))
        with pytest.raises(type(expected.value)) as raised:
            one(input_of(shape, device))
        assert str(raised.value) == str(expected.value)
        assert int(one.num_batches_tracked) == int(other.num_batches_tracked)
    assert int(one.num_batches_tracked) == 2


@pytest.mark.parametrize("name", list(FORMATS))
def test_channels_last_is_kept(name: str, device: str) -> None:
    one, other = pair(name, device)
    for shape in SHAPES[name]:
        input = input_of(shape, device).to(memory_format=FORMATS[name]).requires_grad_()
        output, expected = one(input), other(input)
        assert output.is_contiguous(memory_format=FORMATS[name])
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(output, input, torch.ones_like(expected).cumsum(1))
        assert grad.is_contiguous(memory_format=FORMATS[name])


@each_module
def test_state_dicts_go_both_ways(name: str, device: str) -> None:
    one, other = pair(name, device)
    one(input_of(SHAPES[name][0], device))
    other.load_state_dict(one.state_dict(), strict=True)
    assert_same_state(one, other)
    other(input_of(SHAPES[name][0], device, 2))
    one.load_state_dict(other.state_dict(), strict=True)
    assert_same_state(one, other)
    assert int(one.num_batches_tracked) == 2


@each_module
def test_a_state_dict_of_version_1_has_no_counter(name: str, device: str) -> None:
    one, other = pair(name, device)
    state = other.state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        one.load_state_dict(state, strict=True)
    state._metadata[""]["version"] = 1
    one.load_state_dict(state, strict=True)
    assert int(one.num_batches_tracked) == 0
    assert one._version == other._version == 2


@each_module
def test_copies(name: str, device: str) -> None:
    module, _ = pair(name, device)
    module.skip_nonfinite = True
    module(input_of(SHAPES[name][0], device))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert other.skip_nonfinite
        assert_same_state(other, module)
        assert other.running_mean.data_ptr() != module.running_mean.data_ptr()
        before = module.running_mean.clone()
        other(input_of(SHAPES[name][0], device, 3))
        assert torch.equal(module.running_mean, before)
        assert int(other.num_batches_tracked) == int(module.num_batches_tracked) + 1


@each_module
def test_moved_to_another_dtype(name: str, device: str) -> None:
    """Parameters and statistics of another dtype than the input's, and all of them half."""
    module, _ = pair(name, device)
    shape = SHAPES[name][0]
    for low in (torch.bfloat16, torch.float16):
        expected = copy.deepcopy(module)(input_of(shape, device).to(low).float())
        for other in (copy.deepcopy(module), copy.deepcopy(module).to(low)):
            output = other(input_of(shape, device).to(low))
            assert output.dtype == low
            torch.testing.assert_close(output.float(), expected, rtol=3e-2, atol=3e-2)
            assert int(other.num_batches_tracked) == 1


@each_module
def test_skipping_what_is_not_finite(name: str, device: str) -> None:
    module, _ = pair(name, device)
    input = input_of(SHAPES[name][0], device)
    input[0, 2] = torch.inf
    for skip in (True, False):
        module.skip_nonfinite = skip
        module(input)
        assert torch.equal(
            module.running_mean.isfinite(), torch.tensor([True, True, skip, True, True]).to(device)
        )


@each_module
def test_updating_the_statistics_of_averaged_weights(name: str, device: str) -> None:
    """torch.optim.swa_utils.update_bn finds batch norms by isinstance and sets their momentum to None."""
    one, other = pair(name, device)
    batches = [input_of(SHAPES[name][0], device, seed) for seed in range(3)]
    for module in (one, other):
        torch.optim.swa_utils.update_bn(batches, torch.nn.Sequential(module))
        assert module.momentum == 0.1
    assert_same_state(one, other)


# --- with a residual and an activation --------------------------------------------------------------------

LAYERS: list[tuple[dict[str, Any], Any]] = [
    ({}, torch.nn.ReLU()),
    ({"apply_act": False}, torch.nn.Identity()),
    ({"act_layer": None}, torch.nn.Identity()),
    ({"act_layer": torch.nn.SiLU}, torch.nn.SiLU()),
    ({"act_layer": "hardswish"}, torch.nn.Hardswish()),
    ({"act_layer": torch.nn.LeakyReLU, "act_kwargs": {"negative_slope": 0.2}}, torch.nn.LeakyReLU(0.2)),
    ({"act_layer": torch.nn.GELU, "act_kwargs": {"approximate": "tanh"}}, torch.nn.GELU("tanh")),
    ({"act_layer": torch.nn.GELU, "eps": 1e-3, "momentum": None}, torch.nn.GELU()),
]


@pytest.mark.parametrize(("options", "activation"), LAYERS, ids=lambda each: str(each))
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_norm_residual_and_activation(
    options: dict[str, Any], activation: torch.nn.Module, training: bool, device: str
) -> None:
    plain = {name: value for name, value in options.items() if name in ("eps", "momentum")}
    one = randomised(fastreg.nn.BatchNormAct2d(5, **options)).to(device).train(training)
    other = randomised(torch.nn.BatchNorm2d(5, **plain)).to(device).train(training)
    shape = SHAPES["BatchNorm2d"][0]
    for residual in (None, input_of(shape, device, 2)):
        input = input_of(shape, device).to(memory_format=torch.channels_last)
        output = one(input) if residual is None else one(input, residual)
        expected = activation(other(input) if residual is None else other(input) + residual)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert_same_state(one, other)


def test_an_activation_that_is_not_fused_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'Tanh' is none of the activations .* expected torch\.nn\.ReLU"):
        fastreg.nn.BatchNormAct2d(5, act_layer=torch.nn.Tanh)
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        fastreg.nn.BatchNormAct2d(5, act_layer="swish")


def test_a_layer_between_norm_and_activation(device: str) -> None:
    module = fastreg.nn.BatchNormAct2d(5, drop_layer=lambda: torch.nn.Dropout2d(0.5)).to(device)
    input = input_of((4, 5, 3, 7), device)
    torch.manual_seed(3)
    output = module(input)
    torch.manual_seed(3)
    plain = torch.nn.BatchNorm2d(5).to(device)
    torch.testing.assert_close(output, torch.relu(torch.nn.functional.dropout2d(plain(input), 0.5)))
    assert (output == 0).flatten(2).all(2).any()
    with pytest.raises(ValueError, match="a drop_layer stands between norm and activation"):
        module(input, input)


def test_copies_of_a_layer_with_an_activation(device: str) -> None:
    module = fastreg.nn.BatchNormAct2d(5, act_layer="leaky_relu", act_kwargs={"negative_slope": 0.3}).to(
        device
    )
    assert "activation=leaky_relu, negative_slope=0.3" in repr(module)
    input = input_of((4, 5, 3, 7), device)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(input), copy.deepcopy(module)(input))
    assert list(module.state_dict()) == list(torch.nn.BatchNorm2d(5).state_dict())
