"""The modules: everything torch.nn's do, on the backend under test."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastreg

NAMES = ("LayerNorm", "RMSNorm", "BatchNorm1d")
# tests/test_nn_batch_norm.py has what is special to the norms over channels.
MODULES = [(getattr(fastreg.nn, name), getattr(torch.nn, name)) for name in NAMES]
each_module = pytest.mark.parametrize(("ours", "torchs"), MODULES, ids=NAMES)
each_row_norm = pytest.mark.parametrize(("ours", "torchs"), MODULES[:2], ids=NAMES[:2])


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def pair(ours: type, torchs: type, device: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    return randomised(ours(*arguments, **options)).to(device), randomised(torchs(*arguments, **options)).to(
        device
    )


def input_like(shape: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


def options_of(ours: type) -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = [
        {},
        {"eps": 1e-3},
        {"elementwise_affine": False},
        {"dtype": torch.float32},
    ]
    return [*options, {"bias": False}] if "bias" in inspect.signature(ours).parameters else options


@each_row_norm
@pytest.mark.parametrize("shape", [(40,), [4, 10], 40], ids=str)
def test_same_numbers_and_parameters_as_torchs(ours: type, torchs: type, shape: Any, device: str) -> None:
    for options in options_of(ours):
        one, other = pair(ours, torchs, device, shape, **options)
        assert [(name, each.shape) for name, each in one.named_parameters()] == [
            (name, each.shape) for name, each in other.named_parameters()
        ]
        assert one.extra_repr() == other.extra_repr()
        assert isinstance(one, torchs)
        input = input_like((3, *(shape if isinstance(shape, list) else (40,))), device)
        torch.testing.assert_close(one(input), other(input))


@each_module
def test_the_constructor_is_torchs(ours: type, torchs: type) -> None:
    assert inspect.signature(ours) == inspect.signature(torchs)
    fresh = ours(5)
    assert torch.equal(fresh.weight, torch.ones(5))
    assert str(fresh) == str(torchs(5))


@each_module
def test_state_dicts_go_both_ways(ours: type, torchs: type, device: str) -> None:
    one, other = pair(ours, torchs, device, 40)
    with torch.no_grad():
        one.weight.mul_(3)
    assert list(one.state_dict()) == list(other.state_dict())
    other.load_state_dict(one.state_dict(), strict=True)
    input = input_like((3, 40), device)
    torch.testing.assert_close(one(input), other(input))
    with torch.no_grad():
        other.weight.mul_(2)
    one.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(one(input), other(input))


@each_module
def test_copies(ours: type, torchs: type, device: str) -> None:
    module = randomised(ours(40)).to(device)
    input = input_like((3, 40), device)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "torch.save": torch.load(buffer, weights_only=False),
    }
    for name, other in copies.items():
        assert type(other) is ours, name
        assert torch.equal(other(input), module(input)), name
        assert other.weight.data_ptr() != module.weight.data_ptr(), name


@each_module
def test_moved_to_another_dtype(ours: type, torchs: type, device: str) -> None:
    module = randomised(ours(40)).to(device)
    for dtype in (torch.bfloat16, torch.float16):
        input = input_like((3, 40), device).to(dtype)
        expected = module(input.float())
        # Parameters of another dtype than the input's, which torch's modules refuse on a CPU.
        mixed = module(input)
        assert mixed.dtype == dtype
        torch.testing.assert_close(mixed.float(), expected, rtol=1e-2, atol=1e-2)
        converted = copy.deepcopy(module).to(dtype)
        assert converted(input).dtype == dtype
        torch.testing.assert_close(converted(input).float(), expected, rtol=3e-2, atol=3e-2)


@each_module
def test_made_on_the_meta_device(ours: type, torchs: type, device: str) -> None:
    module = ours(40, device="meta")
    assert module(torch.empty(3, 40, device="meta")).shape == (3, 40)
    module.to_empty(device=device).reset_parameters()
    input = input_like((3, 40), device)
    torch.testing.assert_close(module(input), torchs(40).to(device)(input))


@each_module
def test_training_takes_the_same_path(ours: type, torchs: type, device: str) -> None:
    """Twenty optimiser steps: the same losses as torch's, and hooks run."""

    def losses(kind: type) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 40), kind(40), torch.nn.GELU(), torch.nn.Linear(40, 1)
        ).to(device)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        input, target = input_like((64, 8), device), input_like((64, 1), device)
        history = []
        for _ in range(20):
            optimiser.zero_grad()
            loss = torch.nn.functional.mse_loss(model(input), target)
            loss.backward()
            optimiser.step()
            history.append(loss.item())
        return history

    found, expected = losses(ours), losses(torchs)
    assert found[-1] < 0.8 * found[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@each_module
def test_hooks_run(ours: type, torchs: type, device: str) -> None:
    module = ours(40).to(device)
    seen: list[str] = []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    module(input_like((3, 40), device).requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]


@each_module
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_as_torch(ours: type, torchs: type, low: torch.dtype, device: str) -> None:
    """The dtypes of torch's autocast lists: the CPU's leaves norms alone, the GPU's runs them in float32."""
    one, other = pair(ours, torchs, device, 40)
    linear = torch.nn.Linear(40, 40).to(device)
    input = input_like((3, 40), device)
    with torch.autocast(device, dtype=low):
        hidden = linear(input)
        assert hidden.dtype == low
        # On the CPU, torch's layer_norm takes float32 parameters with a low input and returns the input's dtype.
        found, expected = one(hidden), other(hidden)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.float().sum().backward()
    assert one.weight.grad.dtype == torch.float32


@each_module
def test_without_recording(ours: type, torchs: type, device: str) -> None:
    module, input = ours(40).to(device), input_like((3, 40), device)
    expected = module(input).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            output = module(input)
        assert not output.requires_grad
        assert torch.equal(output, expected)


@pytest.fixture
def one_process(tmp_path: Path, device: str) -> Iterator[None]:
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@each_module
@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel(ours: type, torchs: type, device: str) -> None:
    """DDP hangs its gradient hooks on parameters and puts their gradients into flat, unaligned buckets."""
    model = torch.nn.Sequential(torch.nn.Linear(7, 33), randomised(ours(33))).to(device)
    alone = copy.deepcopy(model)
    parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for _ in range(2):
        for each in (parallel, alone):
            each(input_like((5, 7), device)).square().sum().backward()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@each_module
@pytest.mark.usefixtures("one_process")
def test_fully_sharded_data_parallel(ours: type, torchs: type, device: str) -> None:
    """FSDP2, with its usual mixed precision: parameters arrive as bfloat16 views of one gathered buffer."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def train(kind: type) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 33), randomised(kind(33)), torch.nn.Linear(33, 5)).to(
            device
        )
        if kind is torch.nn.BatchNorm1d:
            # Torch's CPU kernel wants running statistics of the parameters' dtype.
            for name in ("running_mean", "running_var"):
                setattr(model[1], name, getattr(model[1], name).bfloat16())
        mesh = torch.distributed.device_mesh.init_device_mesh(device, (1,))
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        model(input_like((5, 7), device)).float().square().sum().backward()
        return [parameter.grad.full_tensor() for parameter in model.parameters()]

    for one, other in zip(train(ours), train(torchs), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-1)
