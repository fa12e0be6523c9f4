"""torch.compile, torch.export and torch.library's own checks, on the backend under test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastreg
from cases import Case
from channel_norms import BATCH_NORM
from group_norms import GROUP_NORM
from specs import OWN_WAYS, ROW_NORMS
from suite import OpSpec, make_tensors, plain_case, same_bits

# What is above the kernels is the same for every backend: the others have it in a complete run.
pytestmark = pytest.mark.complete(backend=("reference", "triton", "cuda_sim"))


@pytest.fixture(autouse=True)
def _no_graph_of_another_test() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def each_spec(function: Any) -> Any:
    return pytest.mark.parametrize("spec", OWN_WAYS, ids=lambda spec: spec.name)(function)


def example(
    spec: OpSpec, dtype: torch.dtype, device: str, rows: int = 6, columns: int = 40
) -> tuple[Case, Any]:
    case = plain_case(spec, spec.size(rows, columns), spec.mix(dtype))
    return case, make_tensors(spec, case, device)


class Counter:
    """A compiler that runs the graph as it is and counts how many graphs it was given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def forward_and_backward(spec: OpSpec, function: Any, tensors: Any) -> list[torch.Tensor]:
    leaves = [tensors[name].detach().requires_grad_() for name in ("input", *spec.parameters)]
    output = function(*leaves)
    output.backward(tensors["grad_output"])
    return [output.detach(), *[leaf.grad for leaf in leaves]]


def norm_of(spec: OpSpec) -> Any:
    return lambda input, *parameters: spec.call(spec.function, input, *parameters)


@each_spec
def test_compiled_as_one_graph_gives_the_same_bits(spec: OpSpec, dtype: torch.dtype, device: str) -> None:
    _, tensors = example(spec, dtype, device)
    compiler = Counter()
    compiled = torch.compile(norm_of(spec), backend=compiler, fullgraph=True, dynamic=False)
    found = forward_and_backward(spec, compiled, tensors)
    for one, other in zip(found, forward_and_backward(spec, norm_of(spec), tensors), strict=True):
        assert same_bits(one, other)
    assert len(compiler.graphs) == 1


@each_spec
def test_one_graph_for_every_size(spec: OpSpec, device: str) -> None:
    compiler = Counter()
    compiled = torch.compile(norm_of(spec), backend=compiler, fullgraph=True, dynamic=True)
    graphs = []
    for rows, columns in ((6, 40), (7, 33), (13 if spec is GROUP_NORM else 129, 257)):
        _, tensors = example(spec, torch.float32, device, rows, columns)
        found = forward_and_backward(spec, compiled, tensors)
        for one, other in zip(found, forward_and_backward(spec, norm_of(spec), tensors), strict=True):
            assert same_bits(one, other)
        graphs.append(len(compiler.graphs))
    # The first may be more than 1, since dynamo can analyse a function twice; no later size adds one.
    assert graphs == graphs[:1] * 3


@each_spec
def test_compiled_on_other_layouts(spec: OpSpec, device: str) -> None:
    _, tensors = example(spec, torch.float32, device)
    for name in ("input", "grad_output"):
        tensors[name] = tensors[name].t().contiguous().t()
    compiled = torch.compile(norm_of(spec), backend="aot_eager", fullgraph=True)
    found = forward_and_backward(spec, compiled, tensors)
    for one, other in zip(found, forward_and_backward(spec, norm_of(spec), tensors), strict=True):
        torch.testing.assert_close(one, other)
        assert one.stride() == other.stride()


@each_spec
def test_a_change_of_backend_is_seen_by_compiled_code(spec: OpSpec, device: str) -> None:
    """The graph records the op, not the backend that happened to be asked for."""
    _, tensors = example(spec, torch.float32, device)
    compiled = torch.compile(norm_of(spec), backend="aot_eager", fullgraph=True)
    inputs = [tensors[name] for name in ("input", *spec.parameters)]
    first = compiled(*inputs)
    with fastreg.backends.use("reference"):
        torch.testing.assert_close(compiled(*inputs), first)


# Seconds a spec: batch norm stands for the norms over channels.
@pytest.mark.backend_independent
@pytest.mark.parametrize("spec", [*ROW_NORMS, BATCH_NORM], ids=lambda spec: spec.name)
def test_inductor_fuses_around_the_op(spec: OpSpec) -> None:
    _, tensors = example(spec, torch.float32, "cpu")

    def surrounded(input: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return norm_of(spec)(input.sin(), *parameters).square()

    found = forward_and_backward(spec, torch.compile(surrounded, fullgraph=True), tensors)
    for one, other in zip(found, forward_and_backward(spec, surrounded, tensors), strict=True):
        torch.testing.assert_close(one, other)


@each_spec
def test_export_records_one_operator(spec: OpSpec, device: str) -> None:
    _, tensors = example(spec, torch.float32, device)

    class Module(torch.nn.Module):
        def forward(self, input: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            return norm_of(spec)(input, *parameters)

    inputs = tuple(tensors[name] for name in ("input", *spec.parameters))
    free = ({0: torch.export.Dim("rows")}, tuple(None for _ in spec.parameters))
    program = torch.export.export(Module(), inputs, dynamic_shapes=free)
    targets = [str(node.target) for node in program.graph.nodes if "fastreg" in str(node.target)]
    assert targets == [f"fastreg.{spec.name}_fwd.default"]
    longer = (torch.cat((inputs[0], inputs[0])), *inputs[1:])
    torch.testing.assert_close(program.module()(*longer), norm_of(spec)(*longer))


def operators_of(spec: OpSpec, backend: str) -> list[str]:
    return ["fastreg", "fastreg_native"] if backend == "native" else ["fastreg"]


@each_spec
def test_opcheck_forward(spec: OpSpec, dtype: torch.dtype, backend: str, device: str) -> None:
    case, tensors = example(spec, dtype, device)
    for namespace in operators_of(spec, backend):
        operator = getattr(getattr(torch.ops, namespace), f"{spec.name}_fwd").default
        torch.library.opcheck(operator, spec.forward(case, tensors))


def saved_by(forward: Any, arguments: tuple[Any, ...]) -> Any:
    """What the operator returns beside the output, as a spec's ``backward`` takes it."""
    _, *saved = forward(*arguments)
    return saved[0] if len(saved) == 1 else saved


@each_spec
def test_opcheck_backward(spec: OpSpec, dtype: torch.dtype, backend: str, device: str) -> None:
    case, tensors = example(spec, dtype, device)
    for namespace in operators_of(spec, backend):
        forward = getattr(getattr(torch.ops, namespace), f"{spec.name}_fwd").default
        backward = getattr(getattr(torch.ops, namespace), f"{spec.name}_bwd").default
        saved = saved_by(forward, spec.forward(case, tensors))
        count = len(spec.differentiable)
        for wanted in ([True] * count, [True] + [False] * (count - 1), [False] + [True] * (count - 1)):
            torch.library.opcheck(backward, (*spec.backward(case, tensors, saved), wanted))


@each_spec
def test_the_fake_tells_strides_and_dtypes_of_every_layout(spec: OpSpec, device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mix in spec.mixes:
        if torch.float64 in mix.dtypes:
            continue
        for layout in spec.layouts:
            if layout == "scalar":
                continue
            case = plain_case(spec, spec.sizes[-1], mix, layout=layout)
            tensors = make_tensors(spec, case, device)
            given = (*spec.differentiable, *spec.buffers)
            real = spec.function(**{name: tensors[name] for name in given}, **case.arguments)
            with FakeTensorMode() as mode:
                fakes = {
                    name: None if tensors[name] is None else mode.from_tensor(tensors[name]) for name in given
                }
                fake = spec.function(**fakes, **case.arguments)
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
