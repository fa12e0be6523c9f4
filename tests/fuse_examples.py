"""Models whose norms have additions and activations behind them, and what the tests of fusion share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastreg
from fastreg.nn import _fused


def conv(before: int, after: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, size // 2, bias=False)


class Basic(nn.Module):
    """ResNet's block as torchvision writes it: one ReLU for both places, in place, and ``+=``."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(before, after, 3, stride), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(after, after), nn.BatchNorm2d(after)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(conv(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """ResNet's other block, with torch.add and an activation that is a function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = conv(4, width, 1), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn1(self.conv1(x)).relu()
        out = F.leaky_relu(self.bn2(self.conv2(out)), 0.2)
        return F.relu(torch.add(x, self.bn3(self.conv3(out))), inplace=True)


class Inverted(nn.Module):
    """An inverted residual as torchvision writes it: the last norm is in a sequence, the addition outside of it."""

    def __init__(self, width: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Sequential(conv(width, 2 * width, 1), nn.BatchNorm2d(2 * width), activation()),
            nn.Sequential(
                nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=width, bias=False),
                nn.BatchNorm2d(2 * width),
            ),
            activation(),
            nn.Sequential(conv(2 * width, width, 1), nn.BatchNorm2d(width)),
        )
        self.drop_path = nn.Identity()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.drop_path(self.block(input)) + input


class Head(nn.Module):
    """Activations as functions and methods; dropout by self.training, so that the two modes have two graphs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(5))
        self.last = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = F.gelu(self.norms[0](x), approximate="tanh")
        x = F.gelu(self.norms[1](x))
        x = F.hardswish(self.norms[2](x)) * scale
        x = F.silu(self.norms[3](x))
        x = torch.relu(self.norms[4](x))
        x = F.dropout(x, 0.0, self.training).mean((2, 3))
        return self.last(x)


class Net(nn.Module):
    """All of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2))
        self.layer1 = nn.Sequential(Basic(8, 8), Basic(8, 12, 2))
        self.layer2 = nn.Sequential(Bottleneck(12), Inverted(12, nn.SiLU), Inverted(12, nn.Hardswish))
        self.head = Head(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))))


FUSED = {
    "stem.1": "norm + gelu",
    "layer1.0.bn1": "norm + relu",
    "layer1.0.bn2": "norm + add + relu",
    "layer1.1.bn1": "norm + relu",
    "layer1.1.bn2": "norm + add + relu",
    "layer2.0.bn1": "norm + relu",
    "layer2.0.bn2": "norm + leaky_relu",
    "layer2.0.bn3": "norm + add + relu",
    **{
        f"layer2.{block}.block.{place}.1": what
        for block, name in ((1, "silu"), (2, "hardswish"))
        for place, what in ((0, f"norm + {name}"), (1, f"norm + {name}"), (3, "norm + add"))
    },
    **{
        f"head.norms.{index}": f"norm + {name}"
        for index, name in enumerate(("gelu_tanh", "gelu", "hardswish", "silu", "relu"))
    },
}
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def randomise(model: nn.Module) -> nn.Module:
    """Weights, biases and running statistics that are neither ones nor zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(0, 0.5, generator=generator)
    return model


def make() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net())


def fused_names(model: nn.Module, **options: Any) -> dict[str, str]:
    return {item.name: item.what for item in fastreg.convert(model, fuse=True, **options).fused}


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    return {item.name: item.reason for item in fastreg.convert(model, fuse=True, **options).alone}


def assert_same(model: nn.Module, plain: nn.Module, *inputs: Any, **options: Any) -> None:
    """Outputs, gradients of inputs and parameters, and buffers, in both modes."""
    for training in (True, False):
        results = []
        for each in (model, plain):
            each.train(training)
            each.zero_grad()
            own = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
            output = each(*own, **options)
            output.square().sum().backward()
            gradients = [x.grad for x in own if isinstance(x, torch.Tensor)]
            gradients += [parameter.grad for parameter in each.parameters()]
            results.append((output, gradients))
        (output, gradients), (expected, expected_gradients) = results
        assert output.dtype == expected.dtype
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        for gradient, other in zip(gradients, expected_gradients, strict=True):
            assert (gradient is None) == (other is None)
            if gradient is not None:
                scale = max(float(other.abs().max()), 1e-3)
                torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4 * scale)
        assert list(model.state_dict()) == list(plain.state_dict())
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=1e-5, atol=1e-6)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, str | None]]:
    """Of every call of a norm's kernel from now on: whether it has a residual, and its activation."""
    calls: list[tuple[bool, str | None]] = []
    original = _fused._FUSIONS[fastreg.nn.BatchNorm2d].kernel

    def kernel(norm: Any, input: Any, residual: Any, activation: Any, slope: float) -> Any:
        calls.append((residual is not None, activation))
        return original(norm, input, residual, activation, slope)

    monkeypatch.setitem(_fused._FUSIONS, fastreg.nn.BatchNorm2d, _fused.Fusion(kernel))
    return calls
