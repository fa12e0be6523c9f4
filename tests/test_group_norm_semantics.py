"""Group norm and instance norm take, refuse and update what torch's do; on the backend under test."""

from __future__ import annotations

import inspect
import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from backend_under_test import serves_float64
from fastreg.functional import group_norm, instance_norm
from group_norm_examples import RUNNING, leaves_of, tensors
from suite import same_bits

FUNCTIONS = {"group_norm": group_norm, "instance_norm": instance_norm}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def with_arguments(name: str, input: Any, *parameters: Any, **options: Any) -> torch.Tensor:
    """A call with two groups, or without running statistics."""
    between = (2,) if name == "group_norm" else (None, None)
    return FUNCTIONS[name](input, *between, *parameters, **options)


# --- arguments ---


@each_function
def test_the_signature_begins_with_torchs(name: str) -> None:
    ours = list(inspect.signature(FUNCTIONS[name]).parameters.values())
    torchs = list(inspect.signature(getattr(F, name)).parameters.values())
    for one, other in zip(ours, torchs, strict=False):
        assert (one.name, one.default, one.kind) == (other.name, other.default, other.kind)
    assert [each.name for each in ours[len(torchs) :]] == ["activation", "negative_slope"]
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in ours[len(torchs) :])


def test_positional_arguments(device: str) -> None:
    given, other = tensors(device), tensors(device)
    order = ("input", "weight", "bias")
    torch.testing.assert_close(
        group_norm(given["input"], 2, given["weight"], given["bias"], 1e-3),
        F.group_norm(given["input"], 2, given["weight"], given["bias"], 1e-3),
    )
    order = ("input", *RUNNING, "weight", "bias")
    for from_input in (True, False):
        torch.testing.assert_close(
            instance_norm(*(given[each] for each in order), from_input, 0.3, 1e-3),
            F.instance_norm(*(other[each] for each in order), from_input, 0.3, 1e-3),
        )
        for each in order:
            torch.testing.assert_close(given[each], other[each])


ONES = torch.ones(4)
BAD_OF_GROUPS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one value a group in all": ((1, 4), {"num_groups": 4}),
    "one value a group in all, 4D": ((1, 1, 1, 1), {"num_groups": 1}),
    "one value a group before the parameters": ((1, 1), {"num_groups": 1, "weight": torch.ones(9)}),
    "one value, by a division that leaves a rest": ((1, 5), {"num_groups": 4}),
    "groups that do not divide the channels": ((2, 4, 3), {"num_groups": 3}),
    "more groups than channels": ((2, 4, 3), {"num_groups": 8}),
    "a negative number of groups": ((2, 4, 3), {"num_groups": -2}),
    "no dimension": ((), {"num_groups": 1}),
    "one dimension": ((4,), {"num_groups": 1}),
    "short weight": ((2, 4, 3), {"num_groups": 2, "weight": torch.ones(3)}),
    "weight of two dimensions": ((2, 4, 3), {"num_groups": 2, "weight": torch.ones(4, 1)}),
    "weight and bias of the wrong size": (
        (2, 4, 3),
        {"num_groups": 2, "weight": torch.ones(1), "bias": torch.ones(2)},
    ),
    "weight that is no tensor": ((2, 4, 3), {"num_groups": 2, "weight": 1.0}),
    "bias that is no tensor": ((2, 4, 3), {"num_groups": 2, "bias": [1.0]}),
    "eps that is no number": ((2, 4, 3), {"num_groups": 2, "eps": "small"}),
}
BAD_OF_INSTANCES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one element a plane": ((2, 4, 1), {}),
    "one element a plane, 4D": ((2, 4, 1, 1), {}),
    "one element a plane before the parameters": ((2, 4, 1), {"weight": torch.ones(9)}),
    "two dimensions": ((2, 4), {}),
    "no running variance": ((2, 4, 3), {"running_mean": ONES}),
    "no running mean": ((2, 4, 3), {"running_var": ONES}),
    "evaluation without running statistics": ((2, 4, 3), {"use_input_stats": False}),
    "evaluation without running variance": ((2, 4, 3), {"use_input_stats": False, "running_mean": ONES}),
    "weight that is no tensor": ((2, 4, 3), {"weight": 1.0}),
    "running mean that is no tensor": ((2, 4, 3), {"running_mean": 1.0, "running_var": ONES}),
    "momentum that is no number": ((2, 4, 3), {"momentum": "small"}),
    "eps that is no number": ((2, 4, 3), {"eps": "small"}),
}
BAD = [
    *(("group_norm", *each) for each in BAD_OF_GROUPS.items()),
    *(("instance_norm", *each) for each in BAD_OF_INSTANCES.items()),
]


@pytest.mark.parametrize(
    ("name", "title", "bad"), BAD, ids=lambda each: each if isinstance(each, str) else ""
)
def test_bad_arguments_raise_torchs_error(name: str, title: str, bad: Any, device: str) -> None:
    shape, arguments = bad
    given = {
        key: each.to(device) if isinstance(each, torch.Tensor) else each for key, each in arguments.items()
    }
    input = torch.randn(shape, device=device)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as expected:
        getattr(F, name)(input, **given)
    with pytest.raises(type(expected.value)) as raised:
        FUNCTIONS[name](input, **given)
    assert str(raised.value) == str(expected.value)


def test_errors_of_torchs_operator(device: str) -> None:
    """What torch's Python function stumbles over before, and a bias of which torch names the weight's shape."""
    input = torch.randn(2, 4, 3, device=device)
    with pytest.raises(RuntimeError) as expected:
        torch.group_norm(input, 0)
    with pytest.raises(RuntimeError, match=f"^{re.escape(str(expected.value))}$"):
        group_norm(input, 0)
    for bias in (torch.ones(5, device=device), torch.ones((), device=device)):
        with pytest.raises(RuntimeError) as expected:
            F.group_norm(input, 2, bias=bias)
        with pytest.raises(RuntimeError) as raised:
            group_norm(input, 2, bias=bias)
        assert str(raised.value) == str(expected.value).replace("shape [0]", f"shape {list(bias.shape)}")


# Torch repeats them for every sample before it checks, and so names other sizes.
@pytest.mark.parametrize("short", [*RUNNING, "weight", "bias"])
def test_a_vector_of_the_wrong_size_is_named(short: str, device: str) -> None:
    vectors = {each: torch.ones(4, device=device) for each in (*RUNNING, "weight", "bias")}
    vectors[short] = torch.ones(3, device=device)
    for from_input in (True, False):
        with pytest.raises(RuntimeError):
            F.instance_norm(torch.randn(2, 4, 3, device=device), **vectors, use_input_stats=from_input)
        with pytest.raises(RuntimeError, match=f"{short} should contain 4 elements not 3"):
            instance_norm(torch.randn(2, 4, 3, device=device), **vectors, use_input_stats=from_input)


@pytest.mark.parametrize("statistic", RUNNING)
@pytest.mark.parametrize("from_input", [True, False], ids=["of the input", "running"])
def test_running_statistics_that_require_grad_are_refused(
    statistic: str, from_input: bool, device: str
) -> None:
    """As batch norm's; torch's instance norm says so where it takes them as constants."""
    given = {each: torch.ones(3, device=device) for each in RUNNING}
    given[statistic].requires_grad_()
    input = torch.randn(2, 3, 4, device=device, requires_grad=True)
    message = f"not differentiable with respect to argument '{statistic}'"
    with pytest.raises(RuntimeError, match=message):
        instance_norm(input, **given, use_input_stats=from_input)


@each_function
def test_what_only_ours_refuses_is_named(name: str, device: str) -> None:
    input = torch.randn(2, 4, 3, device=device)
    with pytest.raises(ValueError, match=r"unknown activation 'swish'; expected None or one of identity, re"):
        with_arguments(name, input, activation="swish")
    with pytest.raises(RuntimeError, match=f"weight is on meta and the input is on {device}"):
        with_arguments(name, input, torch.ones(4, device="meta"))
    with pytest.raises(TypeError, match=rf"{name}\(\): argument 'input' .* must be Tensor, not list"):
        with_arguments(name, [1.0, 2.0])
    if name == "group_norm":
        for groups in (2.0, "2", None, torch.ones(2)):
            with pytest.raises(TypeError, match=r"argument 'num_groups' .*must be int, not "):
                group_norm(input, groups)  # type: ignore[arg-type]


@each_function
@pytest.mark.parametrize(
    "unsupported", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_an_unsupported_dtype_is_named(name: str, unsupported: torch.dtype, device: str) -> None:
    with pytest.raises(NotImplementedError, match=f'"{name}" not implemented for {unsupported}'):
        with_arguments(name, torch.ones(2, 4, 3, device=device).to(unsupported))
    weight = torch.ones(4, device=device).to(unsupported)
    with pytest.raises(RuntimeError, match=f"weight.*{unsupported}"):
        with_arguments(name, torch.ones(2, 4, 3, device=device), weight)


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        *itertools.product(("group_norm",), ("weight", "bias")),
        *itertools.product(("instance_norm",), (*RUNNING, "weight", "bias")),
    ],
)
def test_float64_mixes_with_nothing(name: str, vector: str, device: str) -> None:
    for one, other in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        given = {each: torch.ones(4, dtype=one, device=device) for each in RUNNING}
        given = {} if name == "group_norm" else given
        given[vector] = torch.ones(4, dtype=other, device=device)
        between = (2,) if name == "group_norm" else ()
        with pytest.raises(RuntimeError, match=f"{vector} is {other} where the input is {one}"):
            FUNCTIONS[name](torch.ones(2, 4, 3, dtype=one, device=device), *between, **given)


@each_function
def test_float64_is_served_or_refused_with_the_remedy(name: str, backend: str, device: str) -> None:
    input = torch.randn(2, 4, 3, dtype=torch.float64, device=device)
    if serves_float64(backend, device):
        expected = F.group_norm(input, 2) if name == "group_norm" else F.instance_norm(input)
        torch.testing.assert_close(with_arguments(name, input), expected)
    else:
        with pytest.raises(RuntimeError, match=f"{backend}.*float64"):
            with_arguments(name, input)


@each_function
def test_parameters_that_are_scattered(name: str, device: str) -> None:
    given = tensors(device)
    every_second = [torch.stack((given[each], given[each]), 1)[:, 0] for each in ("weight", "bias")]
    assert not every_second[0].is_contiguous()
    assert same_bits(
        with_arguments(name, given["input"], *every_second),
        with_arguments(name, given["input"], given["weight"], given["bias"]),
    )


# --- layouts ---


@each_function
def test_what_comes_in_one_layout_goes_out_in_it(name: str, device: str) -> None:
    """channels_last too, of which torch's instance norm makes a contiguous tensor."""
    for shape, formats in (
        ((3, 6, 4, 5), (torch.contiguous_format, torch.channels_last)),
        ((2, 4, 3, 2, 5), (torch.contiguous_format, torch.channels_last_3d)),
    ):
        for memory_format in formats:
            input = torch.randn(shape, device=device).to(memory_format=memory_format).requires_grad_()
            output = with_arguments(name, input, activation="relu")
            assert output.stride() == input.stride()
            (gradient,) = torch.autograd.grad(output.sum(), [input])
            assert gradient.stride() == input.stride()
    input = torch.randn(6, 3, 5, device=device).transpose(0, 1)
    assert with_arguments(name, input[:, :, :]).is_contiguous()


@each_function
def test_the_output_is_a_fresh_tensor(name: str, device: str) -> None:
    input = torch.randn(3, 4, 5, device=device)
    for activation in (None, "identity", "relu"):
        output = with_arguments(name, input, activation=activation)
        assert output.untyped_storage().data_ptr() != input.untyped_storage().data_ptr()


# --- autocast ---


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@each_function
def test_autocast_as_torch(name: str, low: torch.dtype, device: str) -> None:
    """Group norm computes in float32 under CUDA's autocast; nothing else is on a list of torch's."""
    given, other = leaves_of(tensors(device)), leaves_of(tensors(device))
    outputs = []
    with torch.autocast(device, dtype=low):
        for leaves, module in ((given, FUNCTIONS), (other, vars(F))):
            hidden = leaves["input"].transpose(1, 3) @ torch.eye(6, device=device)
            assert hidden.dtype == low
            between = (2,) if name == "group_norm" else (None, None)
            outputs.append(module[name](hidden.transpose(1, 3), *between, leaves["weight"], leaves["bias"]))
    found, expected = outputs
    assert found.dtype == expected.dtype
    assert found.dtype == (torch.float32 if (name, device) == ("group_norm", "cuda") else low)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    assert given["weight"].grad is not None
    assert given["weight"].grad.dtype == torch.float32


# --- running statistics ---


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, 1])
def test_running_statistics_are_torchs(momentum: float, device: str) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ours, torchs = tensors(device), tensors(device)
        for given, function in ((ours, instance_norm), (torchs, F.instance_norm)):
            for scale in (1, 3):
                input = (scale * given["input"]).to(memory_format=memory_format)
                function(input, given["running_mean"], given["running_var"], momentum=momentum)
        for name in RUNNING:
            torch.testing.assert_close(ours[name], torchs[name], rtol=5e-7, atol=5e-7)


def test_autograd_notices_that_running_statistics_changed(device: str) -> None:
    given = tensors(device)
    scale = torch.ones(6, device=device, requires_grad=True)
    statistics = [given[name] for name in RUNNING]
    scattered = [torch.stack((each, each), 1)[:, 0] for each in statistics]
    for moved in (statistics, scattered):
        for from_input in (True, False):
            losses = [(each * scale).sum() for each in moved]
            instance_norm(given["input"], *moved, use_input_stats=from_input)
            for loss in losses:
                if from_input:
                    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                        loss.backward()
                else:
                    loss.backward()
    for one, other in zip(statistics, scattered, strict=True):
        assert same_bits(one, other.contiguous())
    # Our own backward needs none of them, and two forwards before it do no harm.
    outputs = [instance_norm(given["input"] * scale[0], *statistics) for _ in range(2)]
    (outputs[0] + outputs[1]).square().sum().backward()


def test_an_empty_input_leaves_the_running_statistics_alone(device: str) -> None:
    given = tensors(device)
    before = {name: given[name].clone() for name in RUNNING}
    versions = [given[name]._version for name in RUNNING]
    instance_norm(given["input"][:0], given["running_mean"], given["running_var"], momentum=0.5)
    for name, each in before.items():
        assert same_bits(given[name], each)
    assert versions == [given[name]._version for name in RUNNING]


def test_no_channels(device: str) -> None:
    for shape in ((2, 0, 3), (0, 0, 2)):
        given = tensors(device, shape=shape)
        input = given["input"].requires_grad_()
        output = instance_norm(
            input, *(given[name] for name in (*RUNNING, "weight", "bias")), activation="relu"
        )
        assert output.shape == shape
        assert torch.autograd.grad(output.sum(), [input])[0].shape == shape


def test_in_inference_mode(device: str) -> None:
    with torch.inference_mode():
        given, other = tensors(device), tensors(device)
        order = ("input", *RUNNING, "weight", "bias")
        found = instance_norm(*(given[name] for name in order))
        torch.testing.assert_close(found, F.instance_norm(*(other[name] for name in order)))
        for name in RUNNING:
            torch.testing.assert_close(given[name], other[name])
        torch.testing.assert_close(group_norm(given["input"], 2), F.group_norm(given["input"], 2))


def test_a_tensor_subclass_is_asked_first(device: str) -> None:
    seen: list[Any] = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    given = tensors(device)
    running = given["running_mean"].as_subclass(Watched)
    instance_norm(given["input"], running, given["running_var"])
    assert seen[0] is instance_norm
    seen.clear()
    group_norm(given["input"], 2, given["weight"].as_subclass(Watched))
    assert seen[0] is group_norm


@pytest.mark.parametrize("activation", [None, "leaky_relu", "silu"], ids=str)
def test_with_running_statistics_it_is_batch_norm_in_evaluation(activation: str | None, device: str) -> None:
    """Every gradient; and no statistic moves."""
    results = []
    for function in (instance_norm, F.batch_norm):
        given = leaves_of(tensors(device))
        if function is instance_norm:
            output = instance_norm(**given, use_input_stats=False, activation=activation)
        else:
            output = F.batch_norm(**given, training=False)
            output = output if activation is None else getattr(F, activation)(output)
        output.backward(torch.linspace(-1, 2, output.numel(), device=device).view(output.shape))
        results.append([output, *(each.grad for each in given.values()), *(given[name] for name in RUNNING)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert re.fullmatch("(None){2}", "".join(str(each.grad) for each in (given[name] for name in RUNNING)))
