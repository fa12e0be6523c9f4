"""Synchronised batch norm in real processes: each gets a part of a batch, and all must get what one gets of it all.

Functions named ``in_rank_*`` run in the processes, on the backend under test; what they return comes back by rank.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastreg
from backend_under_test import emulated, serves_float64
from cases import Case, Mix
from channel_norms import BATCH_NORM, size
from criterion import Exact, check
from distributed import Processes, ProcessFailed
from fastreg.nn.sync_batch_norm import SyncBatchNorm, SyncBatchNormAct2d
from fastreg.ops.sync_batch_norm import gather_moments, merge_moments, sync_batch_norm
from suite import Tensors, make_tensors, same_bits, subsets

# What is above the kernels is the same for every backend: the others have it in a complete run.
pytestmark = pytest.mark.complete(backend=("reference", "triton", "cuda_sim"))

F32, F64 = torch.float32, torch.float64


@pytest.fixture(scope="module")
def two(backend: str, device: str) -> Iterator[Processes]:
    with Processes(2, backend=backend, device=device) as processes:
        yield processes


@pytest.fixture(scope="module")
def three(backend: str, device: str) -> Iterator[Processes]:
    with Processes(3, backend=backend, device=device) as processes:
        yield processes


# Three processes for emulated kernels say no more of them than two.
where_kernels_are_fast = pytest.mark.complete(backend=("triton", "cuda_sim"))


@pytest.fixture(params=["two", pytest.param("three", marks=where_kernels_are_fast)])
def processes(request: pytest.FixtureRequest) -> Processes:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Processes)
    return found


@pytest.fixture(scope="module")
def exactest(backend: str, device: str) -> torch.dtype:
    """The dtype in which two ways to the same number agree best."""
    return F64 if serves_float64(backend, device) else F32


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().cpu().reshape(-1).view(torch.uint8).tolist())


def own(tensor: torch.Tensor, split: tuple[int, ...]) -> torch.Tensor:
    """This rank's samples of a whole batch."""
    rank = torch.distributed.get_rank()
    return tensor[sum(split[:rank]) : sum(split[: rank + 1])]


def random(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Equal in all processes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(device, dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    unit = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=300 * unit, atol=100 * unit)


# --- the numbers ------------------------------------------------------------------------------------------

SPLITS = {
    2: {"even": (4, 4), "uneven": (1, 6), "empty": (0, 5), "one": (1, 1)},
    3: {"even": (2, 2, 2), "uneven": (1, 2, 5), "empty": (3, 0, 2), "one": (1, 1, 1)},
}


def numeric_cases(samples: int, dtype: torch.dtype) -> list[Case]:
    """Both families, every way to go backward (no activation, recomputed, a bit an element), data that cancels."""
    parameters = F64 if dtype == F64 else F32
    full = Mix((dtype, dtype, *(parameters,) * 4))
    alone = Mix((dtype, None, *(parameters,) * 4))
    bare = Mix((dtype, dtype, None, None, None, None))

    def case(shape: tuple[int, ...], mix: Mix, activation: str | None, **options: Any) -> Case:
        every = BATCH_NORM.differentiable
        found = Case(size(samples, *shape), mix, wanted=every, **options)
        return replace(found, arguments={"training": True, "activation": activation})

    planes, rows = "contiguous", "channels_last"
    return [
        case((5, 3, 3), alone, None),
        case((5, 3, 3), alone, "relu", layout=rows, grad_layout=rows, data="offset"),
        case((5, 3, 3), full, "relu", grad_layout=rows, companion_layout=rows),
        case((9, 2, 5), full, "relu", layout=rows, grad_layout="scalar", companion_layout=planes),
        case((9, 2, 5), full, "silu", layout="channels", data="near_eps"),
        case((9, 2, 5), full, "silu", layout=rows, grad_layout=planes, companion_layout=rows, data="offset"),
        case((3, 2, 2, 2), bare, "leaky_relu", data="tiny"),
        case((17, 7), full, None, layout="transposed"),
        # One value a channel of every sample.
        case((17,), full, "gelu", data="huge"),
        case((17, 1, 1), alone, "hardswish", data="offset"),
    ]


def one_run(case: Case, parts: Tensors) -> dict[str, torch.Tensor]:
    tensors = {name: None if each is None else each.clone() for name, each in parts.items()}
    grad_output = tensors.pop("grad_output")
    buffers = {name: tensors.pop(name) for name in BATCH_NORM.buffers}
    leaves = {name: each.requires_grad_() for name, each in tensors.items() if each is not None}
    output = sync_batch_norm(**leaves, **buffers, **case.arguments)
    versions = [each._version for each in buffers.values() if each is not None]
    assert all(version > 0 for version in versions), "the version counters have to rise"
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    found = {"output": output, **{name: each for name, each in buffers.items() if each is not None}}
    found.update(zip((f"grad_{name}" for name in leaves), gradients, strict=True))
    return found


def sliced(exact: Exact, split: tuple[int, ...]) -> Exact:
    terms = exact.terms.expand_as(exact.value)
    return replace(exact, value=own(exact.value, split), terms=own(terms, split))


def with_rounded_means(exact: Exact, input: torch.Tensor, split: tuple[int, ...], momentum: float) -> Exact:
    """The budget of a running variance whose means travelled in the accumulation's dtype.

    A rank's M2 is about its rounded mean, so a rounding of it enters the merge to first order, by twice the distance
    between that mean and everybody's.
    """
    x = input.detach().cpu().double().movedim(1, 0).reshape(input.shape[1], input.shape[0], -1)
    mean, extra = x.mean((1, 2)), torch.zeros(x.shape[0], dtype=F64)
    for part in x.split(split, dim=1):
        if part.numel() > 0:
            distance = (part.mean((1, 2)) - mean).abs()
            extra += 2 * distance * part.abs().mean((1, 2)) * part.shape[1] / x.shape[1]
    return replace(exact, terms=exact.terms + momentum * extra)


def in_rank_numbers(split: tuple[int, ...], chosen: slice, dtype: torch.dtype, device: str) -> list[bytes]:
    """Everything against float64, twice with equal bits; returns the running statistics."""
    statistics = []
    for case in numeric_cases(sum(split), dtype)[chosen]:
        whole = make_tensors(BATCH_NORM, case, device)
        by_sample = ("input", "residual", "grad_output")
        parts = {
            name: own(each, split) if name in by_sample and each is not None else each
            for name, each in whole.items()
        }
        exact, found, again = BATCH_NORM.exact(case, whole), one_run(case, parts), one_run(case, parts)
        if "running_var" in exact:
            assert whole["input"] is not None
            exact["running_var"] = with_rounded_means(exact["running_var"], whole["input"], split, 0.1)
        for name, result in found.items():
            assert same_bits(result, again[name]), f"{case}: {name} differs between two runs"
            expected = exact[name]
            if name in BATCH_NORM.buffers:
                statistics.append(bits(result))
            elif name in ("grad_weight", "grad_bias"):
                # A rank has its own samples' part, which data parallel training adds up.
                result = result.double()
                torch.distributed.all_reduce(result)
                result = result.to(expected.dtype)
            else:
                expected = sliced(expected, split)
            check(f"{case}: {name}", result, expected)
    return statistics


KINDS = ("even", "uneven", "empty", "one")


@pytest.mark.parametrize("kind", KINDS)
def test_as_one_process_with_the_whole_batch(
    kind: str, dtype: torch.dtype, processes: Processes, backend: str, device: str
) -> None:
    # Emulated kernels take a while: each kind of split sees a part of the cases, all of them together every one.
    chosen = slice(KINDS.index(kind), None, len(KINDS)) if emulated(backend, device) else slice(None)
    found = processes.run(in_rank_numbers, SPLITS[processes.world][kind], chosen, dtype, device)
    assert found[0]
    assert all(statistics == found[0] for statistics in found[1:]), "running statistics differ between ranks"


def in_rank_sizes(dtype: torch.dtype, device: str) -> None:
    """Ranks may differ in everything but the channels; the layouts as well."""
    rank = torch.distributed.get_rank()
    shapes = [(2, 5, 3, 3), (3, 5, 7), (4, 5)]
    inputs = [random(*shape, dtype=dtype, device=device, seed=place) for place, shape in enumerate(shapes)]
    rows = [each.reshape(*each.shape[:2], -1).movedim(1, -1).reshape(-1, 5) for each in inputs]
    expected = torch.nn.functional.batch_norm(torch.cat(rows), None, None, training=True)
    expected = expected.split([len(each) for each in rows])[rank]
    mine = inputs[rank].to(memory_format=torch.channels_last) if rank == 0 else inputs[rank]
    found = sync_batch_norm(mine, None, None, training=True)
    assert found.shape == mine.shape
    assert_close(found.reshape(*mine.shape[:2], -1).movedim(1, -1).reshape(-1, 5), expected)


@where_kernels_are_fast
def test_ranks_of_different_sizes(three: Processes, exactest: torch.dtype, device: str) -> None:
    three.run(in_rank_sizes, exactest, device)


def in_rank_counts(counts: list[int], device: str) -> list[float]:
    rank = torch.distributed.get_rank()
    moments = torch.full((2, 3), float(rank), device=device)
    merged, total = merge_moments(gather_moments(moments, counts[rank], None))
    return [total.item(), *merged[0].tolist(), *merged[1].tolist()]


@pytest.mark.parametrize("counts", [[1, 2**24 + 1], [2**24 - 1, 2**40 + 3], [0, 2**31], [0, 0]], ids=str)
def test_counts_are_exact(counts: list[int], two: Processes, device: str) -> None:
    """float32 has no 2^24 + 1."""
    total = sum(counts)
    mean = counts[1] / max(total, 1)
    squares = 1.0 + counts[0] * mean**2 + counts[1] * (1 - mean) ** 2
    for found in two.run(in_rank_counts, counts, device):
        assert found[0] == total
        assert found[1:] == pytest.approx([mean] * 3 + [squares] * 3, rel=1e-14)


def in_rank_nothing(dtype: torch.dtype, device: str) -> None:
    """No rank has a sample: as in one process, nothing happens."""
    input = torch.empty(0, 4, 2, 2, dtype=dtype, device=device, requires_grad=True)
    weight = torch.ones(4, dtype=dtype, device=device, requires_grad=True)
    running = [torch.full((4,), value, dtype=dtype, device=device) for value in (0.5, 2.0)]
    output = sync_batch_norm(input, *running, weight, training=True, activation="relu", residual=input)
    output.sum().backward()
    assert output.shape == input.grad.shape == input.shape  # type: ignore[union-attr]
    assert torch.equal(weight.grad, torch.zeros_like(weight))  # type: ignore[arg-type]
    assert [each.tolist() for each in running] == [[0.5] * 4, [2.0] * 4]


def in_rank_one_value(dtype: torch.dtype, device: str) -> None:
    """One value of each channel in all processes: it is its own mean."""
    samples = 1 if torch.distributed.get_rank() == 0 else 0
    input = torch.full((samples, 4), 3.0, dtype=dtype, device=device, requires_grad=True)
    bias = random(4, dtype=dtype, device=device)
    running = [torch.full((4,), value, dtype=dtype, device=device) for value in (0.5, 2.0)]
    output = sync_batch_norm(input, *running, None, bias, training=True, momentum=0.5)
    assert torch.equal(output, bias.expand(samples, 4))
    (gradient,) = torch.autograd.grad(output.square().sum(), input)
    # Products with rstd = 1 / sqrt(eps), of which nothing but roundings remains.
    tolerance = 2**14 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, torch.zeros_like(input), rtol=0, atol=tolerance)
    assert [each.tolist() for each in running] == [[1.75] * 4, [1.0] * 4]


@pytest.mark.parametrize("function", [in_rank_nothing, in_rank_one_value])
def test_hardly_any_values(function: Any, two: Processes, exactest: torch.dtype, device: str) -> None:
    two.run(function, exactest, device)


def in_rank_nonfinite(device: str) -> list[bytes]:
    input = random(4, 3, 5, dtype=F32, device=device, seed=torch.distributed.get_rank())
    if torch.distributed.get_rank() == 1:
        input[0, 1, 2] = torch.inf
    found = []
    for skip in (False, True):
        running = torch.zeros(3, device=device), torch.ones(3, device=device)
        output = sync_batch_norm(input, *running, training=True, skip_nonfinite=skip)
        assert output[:, ::2].isfinite().all()
        assert output[:, 1].isnan().any()
        assert running[0][::2].isfinite().all()
        if skip:
            assert (running[0][1].item(), running[1][1].item()) == (0.0, 1.0)
        else:
            assert not running[1][1].isfinite()
        assert (running[0][::2] != 0).all()
        found += [bits(each) for each in running]
    return found


def test_a_nonfinite_value_reaches_its_channel_in_all_ranks(two: Processes, device: str) -> None:
    one, other = two.run(in_rank_nonfinite, device)
    assert one == other


# --- collectives ------------------------------------------------------------------------------------------


@contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Counts the calls of torch.distributed's collectives."""
    counter: Counter[str] = Counter()
    names = (
        *("all_gather", "all_gather_single", "all_gather_into_tensor", "all_gather_object", "all_reduce"),
        *("all_to_all", "all_to_all_single", "barrier", "broadcast", "gather", "reduce", "reduce_scatter"),
        *("reduce_scatter_tensor", "scatter", "send", "recv"),
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            genuine = getattr(torch.distributed, name, None)
            if genuine is not None:
                patch.setattr(torch.distributed, name, _counting(counter, name, genuine))
        yield counter


def _counting(counter: Counter[str], name: str, genuine: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        counter[name] += 1
        return genuine(*arguments, **options)

    return counted


def in_rank_collectives(device: str) -> None:
    gather = (
        "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    )
    one = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    input, residual = (random(4, 3, 5, dtype=F32, device=device, seed=seed) for seed in (1, 2))
    weight, bias = torch.ones(3, device=device), torch.zeros(3, device=device)
    running = torch.zeros(3, device=device), torch.ones(3, device=device)
    everything = {"input": input, "residual": residual, "weight": weight, "bias": bias}
    for wanted in subsets(tuple(everything)):
        leaves = {name: each.detach().requires_grad_(name in wanted) for name, each in everything.items()}
        with collectives() as forward:
            output = sync_batch_norm(
                **leaves, running_mean=running[0], running_var=running[1], training=True, activation="silu"
            )
        assert dict(forward) == {gather: 1}, wanted
        with collectives() as backward:
            if wanted:
                output.sum().backward()
        assert dict(backward) == ({"all_reduce": 1} if "input" in wanted else {}), wanted
        assert [name for name, each in leaves.items() if each.grad is not None] == list(wanted)
    with collectives() as counter:
        for options in ({"training": False}, {"training": True, "process_group": one}):
            leaf = input.clone().requires_grad_()
            found = sync_batch_norm(leaf, running[0].clone(), running[1].clone(), weight, bias, **options)
            options.pop("process_group", None)
            alone = fastreg.functional.batch_norm(
                input, running[0].clone(), running[1].clone(), weight, bias, **options
            )
            assert same_bits(found.detach(), alone)
            found.sum().backward()
    assert not counter


def test_one_collective_in_each_direction(two: Processes, device: str) -> None:
    two.run(in_rank_collectives, device)


def in_rank_subgroup(dtype: torch.dtype, device: str) -> None:
    """Ranks 0 and 2 share their statistics; rank 1 is no member and stands alone."""
    rank = torch.distributed.get_rank()
    group = torch.distributed.new_group([0, 2])
    layer = SyncBatchNorm(5, process_group=group, device=device, dtype=dtype)
    whole = random(9, 5, 4, dtype=dtype, device=device)
    parts = whole.split((2, 3, 4))
    members = [1] if rank == 1 else [0, 2]
    expected_layer = torch.nn.BatchNorm1d(5, device=device, dtype=dtype)
    expected = expected_layer(torch.cat([parts[member] for member in members]))
    before = sum(len(parts[member]) for member in members if member < rank)
    assert_close(layer(parts[rank]), expected[before : before + len(parts[rank])])
    assert_close(layer.running_var, expected_layer.running_var)


@where_kernels_are_fast
def test_a_group_of_some_ranks(three: Processes, exactest: torch.dtype, device: str) -> None:
    three.run(in_rank_subgroup, exactest, device)


# --- derivatives ------------------------------------------------------------------------------------------


def in_rank_second_derivatives(split: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    shape = (sum(split), 3, 4)
    whole = [random(*shape, dtype=dtype, device=device, seed=seed) for seed in range(3)]
    vectors = [random(3, dtype=dtype, device=device, seed=seed) + 1.5 for seed in (3, 4)]

    def second(norm: Any, tensors: list[torch.Tensor], activation: str) -> list[torch.Tensor]:
        input, residual, grad_output = tensors
        leaves = [each.detach().clone().requires_grad_() for each in (input, residual, *vectors)]
        output = norm(leaves[0], None, None, *leaves[2:], True, residual=leaves[1], activation=activation)
        first = torch.autograd.grad(output, leaves, grad_output, create_graph=True)
        penalty = first[0].sin().sum() + first[1].sin().sum()
        return [*first, *torch.autograd.grad(penalty, leaves, materialize_grads=True)]

    for activation in ("relu", "silu"):
        expected = second(fastreg.functional.batch_norm, whole, activation)
        found = second(sync_batch_norm, [own(each, split) for each in whole], activation)
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            if one.dim() == 1:
                torch.distributed.all_reduce(one := one.detach().clone())
            assert_close(one, own(other, split) if place % 4 < 2 else other)


@pytest.mark.parametrize("kind", ["uneven", "empty"])
def test_second_derivatives(kind: str, processes: Processes, exactest: torch.dtype, device: str) -> None:
    processes.run(in_rank_second_derivatives, SPLITS[processes.world][kind], exactest, device)


def in_rank_forward_mode(device: str) -> str:
    input = random(4, 3, dtype=F32, device=device)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="use reverse mode") as caught:
        sync_batch_norm(forward_ad.make_dual(input, input), None, None, training=True)
    with pytest.raises(RuntimeError, match="use reverse mode"):
        torch.func.grad(lambda x: sync_batch_norm(x, None, None, training=True).sum())(input)
    return str(caught.value)


def test_forward_mode_is_refused(two: Processes, device: str) -> None:
    assert "sync_batch_norm: forward-mode" in two.run(in_rank_forward_mode, device)[0]


def in_rank_checkpoint(device: str) -> None:
    input = random(4, 3, 5, dtype=F32, device=device, seed=torch.distributed.get_rank())
    plain, again = (SyncBatchNorm(3, device=device) for _ in range(2))
    again.skip_recompute = True
    one, other = (input.clone().requires_grad_() for _ in range(2))
    plain(one).square().sum().backward()
    checkpoint(again, other, use_reentrant=False).square().sum().backward()
    assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    for mine, theirs in zip(plain.buffers(), again.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_checkpointing_can_count_a_batch_once(two: Processes, device: str) -> None:
    two.run(in_rank_checkpoint, device)


def in_rank_compiled(device: str) -> None:
    layer = SyncBatchNormAct2d(3, device=device)
    eager = copy.deepcopy(layer)
    input = random(4, 3, 5, 5, dtype=F32, device=device, seed=torch.distributed.get_rank())
    compiled = torch.compile(lambda x: layer(x * 2, x) + 1, backend="aot_eager")
    one, other = (input.clone().requires_grad_() for _ in range(2))
    for _ in range(2):
        found, expected = compiled(one), eager(other * 2, other) + 1
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(eager.named_buffers()))


@pytest.mark.only(backend="reference")
def test_compiled_with_a_break(two: Processes, device: str) -> None:
    two.run(in_rank_compiled, device)


# --- training ---------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Every kind of norm that conversion knows."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.first_norm: torch.nn.Module = fastreg.nn.BatchNormAct2d(8)
        self.second = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.second_norm: torch.nn.Module = fastreg.nn.BatchNormAct2d(8, act_layer=torch.nn.SiLU)
        self.third = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.third_norm: torch.nn.Module = torch.nn.BatchNorm2d(8, momentum=None)
        self.last = torch.nn.Linear(8, 2)
        self.to(device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first_norm(self.first(x))
        x = self.second_norm(self.second(x), x)
        x = torch.relu(self.third_norm(self.third(x)))
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


def train(model: torch.nn.Module, input: torch.Tensor, target: torch.Tensor) -> list[float]:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = (model(input) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def distributed_data_parallel(model: torch.nn.Module, device: str) -> torch.nn.Module:
    if device == "cpu":
        # DDP looks for torch's class, and not after it has been built.
        with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
            DistributedDataParallel(SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))
        wrapped = DistributedDataParallel(model)
        SyncBatchNorm.convert_sync_batchnorm(model)
        return wrapped
    return DistributedDataParallel(SyncBatchNorm.convert_sync_batchnorm(model))


def needs_gpus(processes: Processes, device: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < processes.world:
        pytest.skip("FSDP2 on GPUs takes one for each process")


def fully_sharded(model: torch.nn.Module, device: str) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh(device, (torch.distributed.get_world_size(),))
    SyncBatchNorm.convert_sync_batchnorm(model)
    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_rank_training(wrap: Any, dtype: torch.dtype, device: str) -> tuple[list[float], dict[str, bytes]]:
    world = torch.distributed.get_world_size()
    input = random(4 * world, 3, 6, 6, dtype=dtype, device=device)
    input = input.to(memory_format=torch.channels_last)
    target = random(4 * world, 2, dtype=dtype, device=device, seed=1)
    alone, model = Net(dtype, device), Net(dtype, device)
    found = train(wrap(model, device), *(own(each, (4,) * world) for each in (input, target)))
    expected = train(alone, input, target)
    assert expected[-1] < expected[0]
    mean = torch.tensor(found, dtype=F64, device=device) / world
    torch.distributed.all_reduce(mean)
    assert_close(mean.to(dtype), torch.tensor(expected, dtype=dtype, device=device))
    state = model.state_dict()
    for name, other in alone.state_dict().items():
        one = state[name]
        assert_close(
            *(each.full_tensor() if hasattr(each, "full_tensor") else each for each in (one, other))
            if other.is_floating_point()
            else (one.double(), other.double())
        )
    return found, {name: bits(each) for name, each in model.named_buffers()}


@pytest.mark.parametrize("wrap", [distributed_data_parallel, fully_sharded])
def test_training_is_that_of_one_process(
    wrap: Any, two: Processes, exactest: torch.dtype, device: str
) -> None:
    if wrap is fully_sharded:
        needs_gpus(two, device)
    one, other = two.run(in_rank_training, wrap, exactest, device)
    assert one[0] != other[0], "the ranks had the same samples"
    assert one[1] == other[1], "running statistics differ between ranks"


def in_rank_mixed_precision(device: str) -> dict[str, bytes]:
    """FSDP2's usual policy: parameters arrive in bfloat16, the buffers stay float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = SyncBatchNorm.convert_sync_batchnorm(Net(F32, device))
    mesh = torch.distributed.device_mesh.init_device_mesh(device, (torch.distributed.get_world_size(),))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    output = model(random(4, 3, 6, 6, dtype=F32, device=device, seed=torch.distributed.get_rank()))
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.full_tensor().isfinite().all(), name
    assert model.second_norm.running_var.dtype == F32
    return {name: bits(each) for name, each in model.named_buffers()}


def test_sharded_in_mixed_precision(two: Processes, device: str) -> None:
    needs_gpus(two, device)
    one, other = two.run(in_rank_mixed_precision, device)
    assert one == other


# --- modules, in this process -----------------------------------------------------------------------------


def model_of_all_kinds() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1),
        torch.nn.BatchNorm2d(4, eps=1e-3, momentum=None),
        fastreg.nn.BatchNorm2d(4, affine=False),
        torch.nn.Sequential(
            fastreg.nn.BatchNormAct2d(4, act_layer=torch.nn.LeakyReLU, act_kwargs={"negative_slope": 0.3})
        ),
        torch.nn.SyncBatchNorm(4, track_running_stats=False),
        fastreg.nn.BatchNorm2d(4),
        torch.nn.Flatten(2),
        fastreg.nn.BatchNorm1d(4),
    )


def norms_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [each for each in model.modules() if isinstance(each, torch.nn.modules.batchnorm._BatchNorm)]


def test_conversion_keeps_everything(device: str) -> None:
    model = model_of_all_kinds().to(device)
    model[5].skip_nonfinite = True
    model[1].eval()
    model[2].qconfig = "a qconfig"
    input = random(4, 3, 5, 5, dtype=F32, device=device)
    model(input)
    before, state, expected = (
        norms_of(model),
        dict(model.state_dict(keep_vars=True)),
        copy.deepcopy(model)(input),
    )
    assert SyncBatchNorm.convert_sync_batchnorm(model, "a group") is model
    after = norms_of(model)
    kinds = [SyncBatchNorm] * 2 + [SyncBatchNormAct2d] + [SyncBatchNorm] * 3
    assert [type(each) for each in after] == kinds
    assert all(each.process_group == "a group" for each in after)
    for one, other in zip(after, before, strict=True):
        for name in ("eps", "momentum", "affine", "track_running_stats", "training", "num_features"):
            assert getattr(one, name) == getattr(other, name), name
    found = model.state_dict(keep_vars=True)
    assert list(found) == list(state)
    assert all(found[name] is each for name, each in state.items())
    assert after[1].qconfig == "a qconfig"
    assert [each.skip_nonfinite for each in after] == [False] * 4 + [True, False]
    assert "activation=leaky_relu, negative_slope=0.3" in str(after[2])
    # Without torch.distributed it is plain batch norm, whatever the group.
    assert_close(model(input), expected)


def test_a_norm_by_itself_is_converted() -> None:
    layer = SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm3d(4))
    assert type(layer) is SyncBatchNorm
    assert layer.process_group is None
    drops = fastreg.nn.BatchNormAct2d(4, drop_layer=lambda: torch.nn.Dropout(0.5))
    converted = SyncBatchNorm.convert_sync_batchnorm(drops)
    assert converted.drop is drops.drop
    with pytest.raises(ValueError, match="drop_layer stands between"):
        converted(torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3))


def test_what_would_be_lost_is_left_alone() -> None:
    class Own(torch.nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    for layer, reason in ((Own(4), "forward of its own"), (torch.nn.LazyBatchNorm2d(), "not seen an input")):
        model = torch.nn.Sequential(layer)
        with pytest.warns(UserWarning, match=reason):
            SyncBatchNorm.convert_sync_batchnorm(model)
        assert model[0] is layer


def test_torchs_conversion_takes_our_layers(device: str) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), fastreg.nn.BatchNorm2d(4), SyncBatchNorm(4))
    model = model.to(device)
    input = random(4, 3, 5, 5, dtype=F32, device=device)
    model(input)
    expected = model.eval()(input)
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(each) for each in norms_of(model)] == [torch.nn.SyncBatchNorm] * 2
    torch.testing.assert_close(model(input), expected)


@pytest.mark.parametrize("ours", [SyncBatchNorm, SyncBatchNormAct2d])
def test_a_drop_in_for_torchs(ours: Any, device: str) -> None:
    one, other = ours(4, device=device), torch.nn.SyncBatchNorm(4, device=device)
    assert isinstance(one, torch.nn.SyncBatchNorm)
    if ours is SyncBatchNorm:
        assert inspect.signature(ours) == inspect.signature(torch.nn.SyncBatchNorm)
        assert str(one) == str(other)
    input = random(4, 4, 5, 5, dtype=F32, device=device)
    activation = torch.relu if ours is SyncBatchNormAct2d else torch.nn.Identity()
    torch.testing.assert_close(one(input), activation(other(input)))
    # State dicts both ways, also of the first version, which counted no batches.
    other.load_state_dict(one.state_dict())
    state = torch.nn.BatchNorm2d(4).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    one.load_state_dict(state)
    one.load_state_dict(other.state_dict())
    torch.testing.assert_close(one.eval()(input), activation(other.eval()(input)))


BAD_CALLS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "dimensions": lambda layer: layer(torch.randn(4)),
    "channels": lambda layer: layer(torch.randn(4, 0, 2)),
    "one value": lambda layer: layer(torch.randn(1, 4, 1, 1)),
    "too many channels": lambda layer: layer(torch.randn(2, 5)),
}


@pytest.mark.parametrize("call", list(BAD_CALLS))
def test_errors_are_torchs(call: str) -> None:
    with pytest.raises((ValueError, RuntimeError)) as expected:
        BAD_CALLS[call](torch.nn.SyncBatchNorm(4))
    with pytest.raises(expected.type) as found:
        BAD_CALLS[call](SyncBatchNorm(4))
    assert str(found.value) == str(expected.value)


def in_rank_errors(device: str) -> None:
    layer = SyncBatchNorm(4, device=device)
    for call, text in (
        (lambda: layer(torch.randn(4, device=device)), "expected at least 2D input (got 1D input)"),
        (lambda: layer(torch.randn(4, 0, device=device)), "number of input channels should be non-zero"),
        (lambda: layer(torch.randn(2, 5, device=device)), "running_mean should contain 5 elements not 4"),
        (
            lambda: sync_batch_norm(torch.randn(4, 0, device=device), None, None, training=True),
            "number of input channels should be non-zero",
        ),
        (
            lambda: sync_batch_norm(
                torch.randn(4, 2, device=device), None, None, training=True, activation="tanh"
            ),
            "sync_batch_norm: unknown activation 'tanh'",
        ),
    ):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call()
        assert text in str(caught.value)


def test_errors_before_anything_is_sent(two: Processes, device: str) -> None:
    two.run(in_rank_errors, device)


# --- the helper -------------------------------------------------------------------------------------------


def in_rank_failure() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("what went wrong")
    torch.distributed.barrier()


@pytest.mark.backend_independent
def test_a_failing_rank_is_reported_at_once(device: str) -> None:
    with Processes(2, backend="reference", device=device) as processes:
        processes.run(torch.distributed.get_rank)
        start = time.monotonic()
        with pytest.raises(
            ProcessFailed, match=r"rank 1 of 2, in_rank_failure: Traceback[\s\S]*what went wrong"
        ):
            processes.run(in_rank_failure)
        assert time.monotonic() - start < 30
        assert not processes._processes
