"""Group norm and instance norm under torch.compile, torch.export and torch.library's checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from backend_under_test import serves_float64
from cases import Size
from fastreg.functional import instance_norm
from group_norm_examples import KINDS, RUNNING, leaves_of, norm_of, tensors
from group_norms import GROUP_NORM, INSTANCE_NORM
from suite import make_tensors, plain_case, same_bits

# What is above the kernels is the same for every backend: the others have it in a complete run.
pytestmark = pytest.mark.complete(backend=("reference", "triton", "cuda_sim"))


@pytest.fixture(autouse=True)
def _no_graph_of_another_test() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


ORDER = ("input", "weight", "bias", *RUNNING)


@pytest.mark.parametrize("kind", ["group_norm", "tracking"])
@pytest.mark.parametrize(
    ("memory_format", "low"),
    [(torch.contiguous_format, torch.float32), (torch.channels_last, torch.bfloat16)],
    ids=["contiguous", "channels_last"],
)
def test_compiled_as_one_graph(kind: str, memory_format: Any, low: torch.dtype, device: str) -> None:
    """The same bits, running statistics moved exactly once a call."""
    call = norm_of(kind, True, "relu")
    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        given = leaves_of(tensors(device, low))
        arguments = [given[name] for name in ORDER]
        for _ in range(2):
            output = function(arguments[0].to(memory_format=memory_format), *arguments[1:])
            output.float().square().sum().backward()
        results.append([output, *arguments[3:], *(each.grad for each in arguments[:3])])
    for one, other in zip(*results, strict=True):
        assert same_bits(one.detach(), other.detach())
        assert one.stride() == other.stride()
    assert torch.equal(results[0][1], tensors(device, low)["running_mean"]) != (kind == "tracking")


def test_compiled_without_gradients(device: str) -> None:
    call = norm_of("tracking", True, "gelu")
    ours, compiled = tensors(device), tensors(device)
    expected = call(*(ours[name] for name in ORDER))
    found = torch.compile(call, backend="aot_eager", fullgraph=True)(*(compiled[name] for name in ORDER))
    assert same_bits(found, expected)
    for name in RUNNING:
        assert same_bits(ours[name], compiled[name])


@pytest.mark.parametrize("kind", KINDS[1:])
def test_one_graph_for_every_size(kind: str, device: str) -> None:
    """Of samples and planes: the number of groups, here of channels, is a constant of the operators.

    test_compile.py has group norm's.
    """
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    call, counts = norm_of(kind, True, "gelu"), []
    compiled = torch.compile(call, backend=compiler, fullgraph=True, dynamic=True)
    # No two sizes of a shape are equal, which would be taken for a rule.
    for samples, *plane in ((4, 5, 7), (3, 2, 11), (2, 5, 13)):
        shape = (samples, 6, *plane)
        one, other = tensors(device, shape=shape), tensors(device, shape=shape)
        torch.testing.assert_close(
            compiled(*(one[name] for name in ORDER)), call(*(other[name] for name in ORDER))
        )
        counts.append(len(graphs))
    assert counts == counts[:1] * 3


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("group_norm", "fastreg.group_norm_fwd.default"),
        ("instance_norm", "fastreg.group_norm_fwd.default"),
        ("evaluation", "fastreg.batch_norm_eval.default"),
    ],
)
def test_exported(kind: str, target: str, device: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, input: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any) -> torch.Tensor:
            if kind == "evaluation":
                return instance_norm(input, mean, var, weight, bias, False, activation="silu")
            return norm_of(kind, True, "silu")(input, weight, bias)  # type: ignore[no-any-return]

    given = tensors(device)
    inputs = tuple(given[name] for name in ORDER)
    free = ({0: torch.export.Dim("samples"), 3: torch.export.Dim("width")}, *(None,) * 4)
    program = torch.export.export(Module(), inputs, dynamic_shapes=free)
    targets = [str(node.target) for node in program.graph.nodes if "fastreg" in str(node.target)]
    assert targets == [target]
    larger = torch.cat((inputs[0], inputs[0].sin()), 3).repeat(2, 1, 1, 1)
    torch.testing.assert_close(program.module()(larger, *inputs[1:]), Module()(larger, *inputs[1:]))


@pytest.mark.parametrize(
    ("layout", "activation", "low"),
    [
        ("contiguous", "relu", torch.float64),
        ("channels_last", "silu", torch.float16),
    ],
    ids=str,
)
def test_opcheck_of_every_operator(
    layout: str, activation: str | None, low: torch.dtype, backend: str, device: str
) -> None:
    low = low if low != torch.float64 or serves_float64(backend, device) else torch.float32
    options = {"activation": activation}
    for spec, size in ((GROUP_NORM, Size((3, 6, 5), {"num_groups": 2})), (INSTANCE_NORM, Size((3, 6, 5)))):
        case = plain_case(spec, size, spec.mix(low), layout=layout, grad_layout=layout, arguments=options)
        given = make_tensors(spec, case, device)
        for namespace in ("fastreg", "fastreg_native") if backend == "native" else ("fastreg",):
            forward, backward = (
                getattr(getattr(torch.ops, namespace), name).default for name in spec.operators(case)
            )
            arguments = spec.forward(case, given)
            torch.library.opcheck(forward, arguments)
            statistics = forward(*arguments)[1]
            if spec is INSTANCE_NORM:
                # Without running statistics; the backward is group norm's.
                torch.library.opcheck(forward, (*arguments[:3], None, None, *arguments[5:]))
                continue
            for mask in ([True, True, True], [False, True, False]):
                torch.library.opcheck(backward, (*spec.backward(case, given, statistics), mask))


def test_fakes_of_instance_norm_tell_strides_and_dtypes(device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mix in INSTANCE_NORM.mixes:
        if torch.float64 in mix.dtypes:
            continue
        for layout in ("contiguous", "channels_last", "columns"):
            case = plain_case(INSTANCE_NORM, Size((2, 3, 2, 1, 7)), mix, layout=layout)
            given = make_tensors(INSTANCE_NORM, case, device)
            del given["grad_output"]
            real = instance_norm(**given)
            with FakeTensorMode() as mode:
                fake = instance_norm(
                    **{name: None if each is None else mode.from_tensor(each) for name, each in given.items()}
                )
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
