"""Batch norm under torch.compile, torch.export, autocast and torch.library's checks; on the backend under test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from backend_under_test import serves_float64
from batch_norm_examples import leaves_of, tensors
from cases import Size
from channel_norms import BATCH_NORM, differentiated, forward_arguments
from fastreg.functional import batch_norm
from suite import make_tensors, plain_case, same_bits

# What is above the kernels is the same for every backend: the others have it in a complete run.
pytestmark = pytest.mark.complete(backend=("reference", "triton", "cuda_sim"))

each_phase = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
each_format = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


@pytest.fixture(autouse=True)
def _no_graph_of_another_test() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_phase
@each_format
def test_compiled_as_one_graph(training: bool, memory_format: Any, dtype: torch.dtype, device: str) -> None:
    """The same bits, running statistics moved exactly once."""

    def call(*arguments: torch.Tensor) -> torch.Tensor:
        return batch_norm(*arguments[:5], training, residual=arguments[5], activation="relu")

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        for _ in range(2):
            given = leaves_of(tensors(device, dtype))
            order = ("input", "running_mean", "running_var", "weight", "bias", "residual")
            arguments = [given[name] for name in order]
            output = function(arguments[0].to(memory_format=memory_format), *arguments[1:])
            output.float().square().sum().backward()
            results.append(
                [output, *arguments[1:3], *(each.grad for each in arguments if each.requires_grad)]
            )
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert same_bits(one.detach(), other.detach())
            assert one.stride() == other.stride()
    assert torch.equal(results[0][1], tensors(device, dtype)["running_mean"]) != training


def test_compiled_with_the_input_as_its_own_residual(device: str) -> None:
    """One tensor in two places, of which dynamo makes a difference."""

    def call(input: torch.Tensor) -> torch.Tensor:
        return batch_norm(input, None, None, training=True, residual=input, activation="relu")

    gradients = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        input = tensors(device)["input"].detach().requires_grad_()
        gradients += torch.autograd.grad(function(input).square().sum(), [input])
    assert gradients[0].abs().sum() > 0
    assert same_bits(*gradients)


def test_exported_in_evaluation(device: str) -> None:
    given = tensors(device)

    class Module(torch.nn.Module):
        def forward(self, input: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            return batch_norm(input, *parameters, activation="silu")

    inputs = tuple(given[name] for name in ("input", "running_mean", "running_var", "weight", "bias"))
    free = ({0: torch.export.Dim("samples")}, (None,) * 4)
    program = torch.export.export(Module(), inputs, dynamic_shapes=free)
    targets = [str(node.target) for node in program.graph.nodes if "fastreg" in str(node.target)]
    assert targets == ["fastreg.batch_norm_eval.default"]
    longer = (torch.cat((inputs[0], inputs[0])), *inputs[1:])
    torch.testing.assert_close(program.module()(*longer), Module()(*longer))


@pytest.mark.parametrize(
    ("layout", "activation", "low"),
    [
        ("contiguous", None, torch.bfloat16),
        ("contiguous", "relu", torch.float64),
        ("channels_last", "relu", torch.float32),
        ("channels_last", "silu", torch.float16),
    ],
    ids=str,
)
def test_opcheck_of_every_operator(
    layout: str, activation: str | None, low: torch.dtype, backend: str, device: str
) -> None:
    spec, options = BATCH_NORM, {"activation": activation}
    mix = spec.mix(low if low != torch.float64 or serves_float64(backend, device) else torch.float32)
    size = Size((3, 17, 5), {"training": True})
    case = plain_case(spec, size, mix, layout=layout, companion_layout=layout, arguments=options)
    given = make_tensors(spec, case, device)
    training = forward_arguments(case, given)
    evaluating = plain_case(spec, size, mix, arguments={**options, "training": False})
    number, slope = training[8], training[9]
    input, residual, weight, bias = training[:4]
    for namespace in ("fastreg", "fastreg_native") if backend == "native" else ("fastreg",):

        def opcheck(name: str, *arguments: Any, library: str = namespace) -> Any:
            operator = getattr(getattr(torch.ops, library), f"batch_norm_{name}").default
            torch.library.opcheck(operator, arguments)
            return operator(*arguments)

        _, statistics, signs = opcheck("fwd", *training)
        opcheck("eval", *forward_arguments(evaluating, given))
        backward = (*differentiated(case, given, signs), statistics, weight, bias)
        asked = activation is not None
        for phase in (True, False):
            for mask in ([True, asked, True, True], [False, False, True, False]):
                opcheck("bwd", *backward, phase, number, slope, mask)
        opcheck("moments", input)
        opcheck("apply", input, residual, weight, bias, statistics, number, slope, True)
        sums = opcheck("sums", *backward, number, slope)
        for means in (sums, None):
            opcheck("bwd_apply", *backward, means, number, slope, [True, asked])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_as_torch(low: torch.dtype, device: str) -> None:
    """Batch norm is on no list of torch's: the dtype that comes in goes out, parameters stay float32."""
    given, other = leaves_of(tensors(device, shape=(6, 5))), leaves_of(tensors(device, shape=(6, 5)))
    outputs = []
    with torch.autocast(device, dtype=low):
        for leaves, function in ((given, batch_norm), (other, F.batch_norm)):
            hidden = leaves["input"] @ torch.eye(5, device=device)
            assert hidden.dtype == low
            order = ("running_mean", "running_var", "weight", "bias")
            outputs.append(function(hidden, *(leaves[name] for name in order), True))
    found, expected = outputs
    assert found.dtype == expected.dtype == low
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    assert given["weight"].grad is not None
    assert given["weight"].grad.dtype == given["running_mean"].dtype == torch.float32


def test_one_graph_for_every_size(device: str) -> None:
    """One graph serves other sizes than it was traced with."""
    compiled = torch.compile(
        lambda input: batch_norm(input, None, None, training=True, activation="gelu"),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for shape in ((4, 5, 6, 7), (3, 8, 2, 9), (2, 9, 5, 5)):
        input = torch.randn(shape, device=device)
        expected = batch_norm(input, None, None, training=True, activation="gelu")
        torch.testing.assert_close(compiled(input), expected)
