"""What only a GPU can show of masks: captured graphs, huge tensors and no waiting. Only with ``--device cuda``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastreg
from fastreg import functional as F
from masks import half_lane

pytestmark = pytest.mark.only(device="cuda")

SHAPE = (8, 16, 28, 28)
FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "dropout": F.dropout,
    "dropout2d": F.dropout2d,
    "drop_path": lambda x, p, **options: F.drop_path(x, p, residual=x, **options),
    "drop_block2d": lambda x, p, **options: F.drop_block2d(x, p, 5, gamma="exact", **options),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def captured(function: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph, output


@each_function
def test_every_replay_of_a_graph_draws_anew(name: str) -> None:
    input = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def forward_and_backward() -> torch.Tensor:
        output = FUNCTIONS[name](input, 0.3)
        (gradient,) = torch.autograd.grad(output.float().sum(), input)
        return torch.stack((output.detach().flatten(), gradient.flatten()))

    graph, results = captured(forward_and_backward)
    found = []
    for _ in range(3):
        graph.replay()
        found.append(results.clone())
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    if name in ("dropout", "dropout2d", "drop_block2d"):
        for output, gradient in found:
            assert torch.equal(output == 0, gradient == 0)


@pytest.mark.parametrize("name", ["dropout", "dropout2d", "drop_block2d"])
def test_a_schedule_needs_no_new_capture(name: str) -> None:
    input = torch.ones(SHAPE, device="cuda")
    p = torch.zeros((), device="cuda", dtype=torch.float64)
    graph, output = captured(lambda: FUNCTIONS[name](input, p))
    shares = []
    for rate in (0.0, 0.5, 1.0):
        p.fill_(rate)
        graph.replay()
        shares.append((output == 0).double().mean().item())
    assert shares[0] == 0.0
    assert 0.3 < shares[1] < 0.7
    assert shares[2] == 1.0


@each_function
def test_nothing_waits_for_the_device(name: str) -> None:
    input = torch.randn(SHAPE, device="cuda", requires_grad=True)
    p = torch.full((), 0.3, device="cuda")
    FUNCTIONS[name](input, p).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        FUNCTIONS[name](input, p).sum().backward()
        FUNCTIONS[name](input, 0.3).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_function
def test_masks_are_those_of_a_cpu(name: str) -> None:
    input = torch.rand(SHAPE, dtype=torch.float32) + 0.5
    with fastreg.backends.use("reference"):
        expected = FUNCTIONS[name](input, 0.3, seed=9)
    torch.testing.assert_close(FUNCTIONS[name](input.cuda(), 0.3, seed=9).cpu(), expected)


def test_beyond_32_bits_of_elements() -> None:
    count = 2**31 + 4099
    input = torch.ones(count, device="cuda", dtype=torch.bfloat16)
    output = F.dropout(input, 0.5, seed=5)
    for first in (0, 2**31 - 64, count - 64):
        found = (output[first : first + 64] != 0).tolist()
        assert found == [half_lane(5, unit) >= 2**15 for unit in range(first, first + 64)]
    assert F.dropout(input, 0.5, seed=5, inplace=True)[-1] == output[-1]
