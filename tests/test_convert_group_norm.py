"""convert and fuse on group and instance norms, torch's and (as stand-ins of the same names) timm's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastreg
from fastreg.nn import external
from stand_in_layers import install

pytestmark = pytest.mark.backend_independent


class Residual(nn.Module):
    """A block of a diffusion model's U-Net: norm, SiLU, convolution, twice, and the input added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(2, width, affine=False), nn.Conv2d(width, width, 3, padding=1)
        self.nonlinearity = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        return x + self.conv2(self.nonlinearity(self.norm2(h)))


class Added(nn.Module):
    """Norms whose output is added to something: only the batch norm is one kernel with that."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.group, self.batch = nn.GroupNorm(2, width), nn.BatchNorm2d(width)
        self.shortcut = nn.InstanceNorm2d(width, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.batch(x) + self.shortcut(x))
        return torch.sigmoid(x) + self.group(x)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.InstanceNorm2d(8, track_running_stats=True),
        nn.LeakyReLU(0.2),
        Residual(8),
        Added(8),
        nn.Flatten(2),
        nn.InstanceNorm1d(8, affine=True),
        nn.GELU(),
        nn.Unflatten(2, (4, 3, 2)),
        nn.InstanceNorm3d(8),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if name.endswith("weight") else parameter.normal_()
    return model


FUSED = {
    "1": "norm + leaky_relu",
    "3.norm1": "norm + silu",
    "3.norm2": "norm + silu",
    "4.batch": "norm + add + relu",
    "6": "norm + gelu",
}
ALONE = {
    "4.group": "followed by an addition, which GroupNorm is not fused with",
    "4.shortcut": "followed by an addition, which InstanceNorm2d is not fused with",
    "9": "neither an addition nor an activation follows it",
}


def results(model: nn.Module, input: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    leaf = input.clone().requires_grad_()
    output = model(leaf)
    output.backward(output.detach().cos())
    gradients = [parameter.grad for parameter in model.parameters()]
    return [output, leaf.grad, *gradients, *model.buffers()]  # type: ignore[list-item]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_model_stays_what_it_was(fuse: bool, layout: torch.memory_format) -> None:
    model: Any = make_model().to(memory_format=layout)
    plain, kinds = copy.deepcopy(model), [type(module) for module in model.modules()]
    report = fastreg.convert(model, fuse=fuse)
    assert len(report.replaced) == 8
    assert report.kept == []
    assert {item.name: item.what for item in report.fused} == (FUSED if fuse else {})
    for name, reason in (ALONE if fuse else {}).items():
        assert reason in {item.name: item.reason for item in report.alone}[name]
    twin = pickle.loads(pickle.dumps(model))
    for training in (True, False):
        input = torch.randn(2, 3, 6, 8).contiguous(memory_format=layout)
        expected = results(plain.train(training), input)
        for each in (model, twin):
            for found, other in zip(results(each.train(training), input), expected, strict=True):
                torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == list(plain.state_dict())
    fastreg.revert(model)
    assert [type(module) for module in model.modules()] == kinds


def test_a_fused_model_compiles_and_exports() -> None:
    model, input = make_model().eval(), torch.randn(2, 3, 6, 8)
    expected = model(input)
    fastreg.convert(model, fuse=True)
    torch.testing.assert_close(
        torch.compile(model, backend="aot_eager", fullgraph=True)(input), expected, rtol=1e-4, atol=1e-4
    )
    exported = torch.export.export(model, (input,)).module()
    torch.testing.assert_close(exported(input), expected, rtol=1e-4, atol=1e-4)


def test_an_input_without_a_batch_goes_on_through_a_fused_layer() -> None:
    model = nn.Sequential(nn.InstanceNorm1d(4, affine=True), nn.ReLU())
    plain = copy.deepcopy(model)
    assert [item.what for item in fastreg.convert(model, fuse=True).fused] == ["norm + relu"]
    for shape in ((2, 4, 7), (4, 7)):
        input = torch.randn(shape)
        torch.testing.assert_close(model(input), plain(input))


def test_what_is_kept() -> None:
    class Own(nn.GroupNorm):
        """A subclass, which may compute something else."""

    model = nn.ModuleDict(
        {"own": Own(3, 3), "lazy": nn.LazyInstanceNorm2d(), "ours": fastreg.nn.GroupNormAct(64)}
    )
    reasons = {item.name: item.reason for item in fastreg.convert(model).kept}
    assert "subclass of torch.nn.GroupNorm" in reasons["own"]
    assert "lazy" in reasons["lazy"]
    assert "already fastreg's" in reasons["ours"]


def as_if_installed(monkeypatch: pytest.MonkeyPatch, layer: str) -> Any:
    """A class of timm's name that does what timm's does: norm, dropout, activation."""
    path = external._LAYERS[layer][0]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(x)) if path.endswith("Act") else x

    monkeypatch.delitem(vars(external), layer, raising=False)
    return install(monkeypatch, path, nn.GroupNorm, forward=forward)


ACTS: list[tuple[Callable[[], nn.Module], Callable[[], nn.Module], list[str | None]]] = [
    (nn.SiLU, nn.Identity, ["silu"]),
    (nn.Mish, nn.Identity, [None]),
    (nn.ReLU, lambda: nn.Dropout(0.0), [None]),
]


@pytest.mark.parametrize("layer", [name for name in external._LAYERS if "GroupNorm" in name])
@pytest.mark.parametrize(("act", "drop", "calls"), ACTS, ids=["silu", "mish", "relu and dropout"])
def test_timms_layers(
    layer: str,
    act: Callable[[], nn.Module],
    drop: Callable[[], nn.Module],
    calls: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = as_if_installed(monkeypatch, layer)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), kind(2, 4), nn.ReLU())
    model[1].act, model[1].drop = act(), drop()
    plain, input = copy.deepcopy(model), torch.randn(2, 3, 5, 5)
    asked: list[str | None] = []
    original = external.group_norm_of

    def group_norm_of(norm: Any, x: Any, residual: Any = None, activation: Any = None, *rest: Any) -> Any:
        asked.append(activation)
        return original(norm, x, residual, activation, *rest)

    monkeypatch.setattr(external, "group_norm_of", group_norm_of)
    report = fastreg.convert(model)
    assert report.replaced[0].after.rpartition(".")[2] == layer
    assert isinstance(model[1], kind)
    torch.testing.assert_close(model(input), plain(input))
    assert asked == (calls if "Act" in layer else [None])
    fastreg.revert(model)
    assert type(model[1]) is kind
    # What a norm without an activation of its own is fused with is the one behind it.
    merged = [item.what for item in fastreg.convert(model, fuse=True).fused]
    assert merged == ([] if "Act" in layer else ["norm + relu"])
    torch.testing.assert_close(model(input), plain(input))
