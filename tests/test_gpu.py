"""What only a GPU can show: streams, graph capture, devices, synchronisation, memory. Only with ``--device cuda``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cases import Case
from specs import SPECS
from suite import OpSpec, Tensors, make_tensors, plain_case, same_bits

pytestmark = [
    pytest.mark.only(device="cuda"),
    pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name),
]

LOW = torch.bfloat16


def example(spec: OpSpec, device: str, rows: int = 64, columns: int = 1024) -> tuple[Case, Tensors]:
    case = plain_case(spec, spec.size(rows, columns), spec.mix(LOW))
    return case, make_tensors(spec, case, device)


def forward_and_backward(spec: OpSpec, case: Case, tensors: Tensors) -> list[torch.Tensor]:
    leaves: list[Any] = [tensors[name].detach().requires_grad_() for name in spec.differentiable]  # type: ignore[union-attr]
    given = dict(zip(spec.differentiable, leaves, strict=True))
    output = spec.function(**given, **{name: tensors[name] for name in spec.buffers}, **case.arguments)
    return [output.detach(), *torch.autograd.grad(output, leaves, tensors["grad_output"])]


def test_on_a_side_stream(spec: OpSpec) -> None:
    """The input is written late on the side stream: kernels launched on any other stream would read it too early."""
    case, tensors = example(spec, "cuda")
    expected = forward_and_backward(spec, case, tensors)
    late = {name: None if values is None else torch.zeros_like(values) for name, values in tensors.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for name, values in tensors.items():
            if values is not None:
                late[name].copy_(values)  # type: ignore[union-attr]
        found = forward_and_backward(spec, case, late)
    stream.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert same_bits(one.cpu(), other.cpu())


def test_in_a_captured_graph(spec: OpSpec) -> None:
    case, tensors = example(spec, "cuda")
    warmup = torch.cuda.Stream()
    warmup.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup):
        for _ in range(3):
            forward_and_backward(spec, case, tensors)
    torch.cuda.current_stream().wait_stream(warmup)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(spec, case, tensors)
    for scale in (1.0, -3.0):
        tensors["input"].mul_(scale).add_(0.25)  # type: ignore[union-attr]
        graph.replay()
        for one, other in zip(captured, forward_and_backward(spec, case, tensors), strict=True):
            assert same_bits(one.cpu(), other.cpu())


@pytest.mark.parametrize("index", range(torch.cuda.device_count()))
def test_on_every_device(spec: OpSpec, index: int) -> None:
    """With another device current than the tensors'."""
    case, tensors = example(spec, f"cuda:{index}")
    expected = forward_and_backward(spec, case, example(spec, "cuda:0")[1])
    with torch.cuda.device(torch.cuda.device_count() - 1 - index):
        found = forward_and_backward(spec, case, tensors)
    for one, other in zip(found, expected, strict=True):
        assert one.device.index == index
        torch.testing.assert_close(one.cpu(), other.cpu())


def test_nothing_waits_for_the_gpu(spec: OpSpec) -> None:
    case, tensors = example(spec, "cuda")
    forward_and_backward(spec, case, tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = forward_and_backward(spec, case, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(each.isfinite().all() for each in found)


@pytest.mark.only(backend=("triton", "native"))
def test_memory_of_a_call(spec: OpSpec) -> None:
    """A forward allocates its output and a few bytes a row; a backward its gradients and the partial sums.

    The reference's intermediate results are in float32 and as large as the input.
    """
    case, tensors = example(spec, "cuda", rows=8192)
    input = tensors["input"]
    assert input is not None
    results = sum(each.nbytes for each in forward_and_backward(spec, case, tensors))
    # Group norm has two sums in fp32 for each channel of each sample, of which there are as many as elements here.
    sums = 8 * input.numel() if spec.name == "group_norm" else 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        given = {name: tensors[name] for name in (*spec.parameters, *spec.buffers)}
        output = spec.function(input, **given, **case.arguments)
    assert output.shape == input.shape
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * input.nbytes
    del output
    forward_and_backward(spec, case, tensors)
    assert torch.cuda.max_memory_allocated() - before <= 1.25 * results + sums
