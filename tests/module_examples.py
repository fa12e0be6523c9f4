"""What the tests of the modules over channels give to them, and compare of them."""

from __future__ import annotations

import torch


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in (*module.parameters(), *module.buffers()):
            if each.is_floating_point():
                each.copy_(torch.rand(each.shape, generator=generator) + 0.5)
    return module


def input_of(shape: tuple[int, ...], device: str, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_same_state(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    for name, each in one.state_dict().items():
        torch.testing.assert_close(each, other.state_dict()[name], rtol=1e-5, atol=1e-6)
