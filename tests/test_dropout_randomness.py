"""How masks follow torch's generators, on the backend under test: seeds, checkpoints, transforms, graphs, processes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastreg
from distributed import Processes
from fastreg import functional as F
from suite import same_bits

# What is above the kernels is the same for every backend: the others have it in a complete run.
pytestmark = pytest.mark.complete(backend=("reference", "triton", "cuda_sim"))

SHAPE = (4, 6, 8, 8)

# What each function of the family makes of ones; the ones that are dropped are 0.
FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "dropout": lambda x, p=0.5, **options: F.dropout(x, p, **options),
    "dropout2d": lambda x, p=0.5, **options: F.dropout2d(x, p, **options),
    "drop_path": lambda x, p=0.5, **options: F.drop_path(x.flatten(0, 1), p, **options).reshape(x.shape),
    "dropout_add": lambda x, p=0.5, **options: F.dropout_add(x, torch.zeros_like(x), p, **options),
    "drop_block2d": lambda x, p=0.5, **options: F.drop_block2d(x, p, 3, gamma="exact", **options),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture(autouse=True)
def _no_graph_of_another_test() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- generators ---


@each_function
def test_masks_follow_the_generator(name: str, device: str) -> None:
    function, input = FUNCTIONS[name], torch.ones(SHAPE, device=device)
    torch.manual_seed(3)
    first, second = function(input), function(input)
    torch.manual_seed(3)
    assert torch.equal(function(input), first)
    assert torch.equal(function(input), second)
    assert not torch.equal(first, second)
    own = torch.Generator(device).manual_seed(3)
    assert torch.equal(function(input, generator=own), first)
    assert torch.equal(function(input, generator=own), second)
    by_seed = function(input, seed=-5)
    assert torch.equal(by_seed, function(input, seed=torch.tensor([-5], device=device)))
    assert torch.equal(by_seed, function(input, seed=2**64 - 5))
    assert not torch.equal(by_seed, function(input, seed=5))


@pytest.mark.parametrize("reentrant", [True, False])
@each_function
def test_checkpoints_draw_the_same_mask_again(name: str, reentrant: bool, device: str) -> None:
    function = FUNCTIONS[name]
    input = torch.randn(SHAPE, device=device).requires_grad_()
    found: list[Any] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        # The second mask depends on where the first one left the generator.
        return function(function(x.sin()).exp())

    for through in (lambda x: block(x), lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(8)
        output = through(input)
        input.grad = None
        output.sum().backward()
        found.append((output.detach(), input.grad, torch.rand(1, device=device)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# --- transforms ---


@each_function
def test_vmap_asks_how_to_draw(name: str, device: str) -> None:
    function, input = FUNCTIONS[name], torch.ones(3, *SHAPE, device=device)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(function)(input)
    same = torch.func.vmap(function, randomness="same")(input)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    different = torch.func.vmap(function, randomness="different")(input)
    assert not torch.equal(different[0], different[1])
    for each in (same[0], *different):
        assert 0 < (each == 0).sum() < each.numel()
    seeded = torch.func.vmap(lambda x: function(x, seed=4))(input)
    assert torch.equal(seeded[1], function(input[1], seed=4))


@each_function
def test_derivatives_by_transforms(name: str, device: str) -> None:
    function, input = FUNCTIONS[name], torch.randn(SHAPE, device=device)
    factor = function(torch.ones_like(input), seed=4)
    gradient = torch.func.grad(lambda x: function(x, seed=4).square().sum())(input)
    torch.testing.assert_close(gradient, 2 * factor.square() * input)
    _, tangent = torch.func.jvp(lambda x: function(x, seed=4), (input,), (torch.ones_like(input),))
    torch.testing.assert_close(tangent, factor)


# --- compilation ---


class Counter:
    """A compiler that runs the graph as it is and counts how many graphs it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@each_function
def test_compiled_as_one_graph(name: str, device: str) -> None:
    function, compiler = FUNCTIONS[name], Counter()
    input = torch.randn(SHAPE, device=device, requires_grad=True)
    compiled = torch.compile(function, backend=compiler, fullgraph=True, dynamic=False)
    seeded = torch.compile(lambda x: function(x, seed=4), backend=compiler, fullgraph=True, dynamic=False)
    for one, other in ((seeded(input), function(input, seed=4)),):
        assert same_bits(one, other)
        found, expected = (torch.autograd.grad(each.sum(), input)[0] for each in (one, other))
        assert same_bits(found, expected)
    torch.manual_seed(6)
    first, second = compiled(input), compiled(input)
    assert not torch.equal(first, second)
    torch.manual_seed(6)
    assert torch.equal(compiled(input), first)
    assert compiler.graphs == 2


@pytest.mark.parametrize("name", ["dropout", "drop_path", "drop_block2d"])
def test_a_rate_in_a_tensor_compiles_once(name: str, device: str) -> None:
    function, compiler = FUNCTIONS[name], Counter()
    input = torch.ones(SHAPE, device=device)
    compiled = torch.compile(
        lambda x, p: function(x, p, seed=2), backend=compiler, fullgraph=True, dynamic=False
    )
    p = torch.zeros((), device=device)
    for rate in (0.0, 0.25, 0.5, 1.0):
        p.fill_(rate)
        assert torch.equal(compiled(input, p), function(input, p, seed=2))
    assert compiler.graphs == 1


def test_a_schedule_compiles_once(device: str) -> None:
    compiler = Counter()
    model = torch.nn.Sequential(fastreg.nn.DropBlock2d(0.0, 3), fastreg.nn.Dropout(0.0)).to(device)
    schedule = fastreg.nn.LinearSchedule(model, 0.0, 0.9, steps=3)
    compiled = torch.compile(model, backend=compiler, fullgraph=True, dynamic=False)
    shares, graphs = [], []
    for _ in range(4):
        shares.append((compiled(torch.ones(SHAPE, device=device)) == 0).double().mean().item())
        graphs.append(compiler.graphs)
        schedule.step()
    # The first compilation may take a second start, which is torch's affair.
    assert graphs == graphs[:1] * 4
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    assert shares[3] > 0.8


@pytest.mark.only(backend="native", device="cpu")
def test_inductor_draws_as_eager_does_from_a_seed(device: str) -> None:
    def block(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.dropout_add(x.sin(), y, 0.3, seed=4) + F.dropout(x, 0.5)

    input = torch.randn(16, 40, device=device)
    compiled = torch.compile(block, fullgraph=True)
    torch.manual_seed(1)
    first, second = compiled(input, input), compiled(input, input)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(input, input), first)


@each_function
def test_exported_programs_draw_anew(name: str, device: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return FUNCTIONS[name](x)

    input = torch.ones(SHAPE, device=device)
    program = torch.export.export(Module(), (input,)).module()
    first, second = program(input), program(input)
    assert not torch.equal(first, second)
    assert 0 < (first == 0).sum() < first.numel()


def test_opcheck_of_every_operator(backend: str, device: str) -> None:
    libraries = ["fastreg"] + (["fastreg_native"] if backend == "native" else [])
    seed = torch.tensor(3, device=device)
    input = torch.randn(4, 6, device=device)
    rows, layers = torch.rand(4, device=device), torch.rand(6, device=device)
    limit = torch.tensor(9000, device=device)
    maps = torch.randn(2, 3, 5, 5, device=device)
    scale = torch.ones(1, dtype=torch.float64, device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for library in libraries:
        operators = getattr(torch.ops, library)

        def opcheck(name: str, *arguments: Any, operators: Any = operators) -> None:
            torch.library.opcheck(getattr(operators, name).default, arguments, test_utils=tests)

        opcheck("dropout_fwd", input, None, None, None, seed, 20000, None, 0, True)
        opcheck("dropout_fwd", input.bfloat16(), input, rows, layers, seed, 0, limit, 0, True)
        opcheck("dropout_fwd", maps, None, None, None, seed, 2**31, None, 1, False)
        opcheck("dropout_inplace", input.clone(), seed, 20000, None, 0, True)
        opcheck("dropout_bwd", input, None, None, None, seed, 20000, None, 0, True, 1, [True, False])
        opcheck("dropout_bwd", input, input, rows, layers, seed, 0, limit, 0, True, 0, [True, True])
        opcheck("drop_block_mask", seed, [2, 3, 5, 5], [3, 3], 2**28, None, False)
        bits, _ = operators.drop_block_mask.default(seed, [2, 3, 5, 5], [3, 3], 2**28, None, False)
        opcheck("drop_block_apply", maps, bits, scale)
        opcheck("drop_block_inplace", maps.clone(), bits, scale)


# --- processes and copies ---


def _mask_of_rank(base: int) -> list[float]:
    torch.manual_seed(base + torch.distributed.get_rank())
    layer = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(64, 64), fastreg.nn.Dropout(0.5))
    )
    kept = (layer(torch.ones(64, 64)) != 0).float() * 2 - 1
    return kept.flatten().tolist()  # type: ignore[no-any-return]


@pytest.mark.only(backend="native", device="cpu")
def test_ranks_seeded_apart_draw_apart() -> None:
    """As with torch's own dropout, what a rank draws is up to its seed."""
    with Processes(2, backend="native", device="cpu") as processes:
        one, other = (torch.tensor(mask) for mask in processes.run(_mask_of_rank, 10))
        same, again = (torch.tensor(mask) for mask in processes.run(_mask_of_rank, 10))
    assert torch.equal(one, same)
    assert torch.equal(other, again)
    # 4096 pairs: five standard deviations of a correlation of 0.
    assert (one * other).mean().abs() < 5 / 64


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_layers_are_copied_with_their_rates(copied: Any) -> None:
    nn = fastreg.nn
    for layer in (
        *(nn.Dropout(0.3), nn.Dropout1d(0.3, True), nn.Dropout2d(torch.tensor(0.3)), nn.Dropout3d(0.3)),
        *(
            nn.DropPath(0.3, mode="batch"),
            nn.DropoutAdd(0.3),
            nn.DropBlock2d(0.3, (3, 5)),
            nn.DropBlock3d(0.3, 3),
        ),
    ):
        other = copied(layer)
        assert type(other) is type(layer)
        assert repr(other) == repr(layer)
        assert other.p == layer.p


def test_autocast_leaves_the_dtype(device: str) -> None:
    input = torch.ones(4, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert F.dropout(input, 0.5).dtype == torch.float32
        assert F.dropout_add(input.bfloat16(), input, 0.5).dtype == torch.float32


def test_two_schedules_in_one_graph(device: str) -> None:
    """Of blocks of different sizes, whose rates come from different tables."""
    layers = [fastreg.nn.DropBlock2d(0.2, length, gamma="exact") for length in (3, 5)]
    model = torch.nn.Sequential(*layers, torch.nn.ReLU()).to(device)
    fastreg.nn.LinearSchedule(model, 0.3, 0.3, 1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    assert 0 < (compiled(torch.ones(SHAPE, device=device)) == 0).double().mean().item() < 1
