"""convert and revert: what is replaced, what is kept and why, and that nothing else of the model changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastreg
from fastreg.nn import external
from stand_in_layers import install

pytestmark = pytest.mark.backend_independent


class Special(nn.LayerNorm):
    """A subclass, which may compute something else."""


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width)
        self.middle = nn.Linear(width, width)
        self.second = nn.RMSNorm(width, eps=1e-3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input + self.second(self.middle(self.first(input)))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def test_every_known_layer_is_replaced_and_reverted() -> None:
    model = make_model()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
    report = fastreg.convert(model)
    assert (
        [item.name for item in report.replaced]
        == names
        == ["0.first", "0.second", "1.first", "1.second", "2"]
    )
    assert report.kept == []
    assert isinstance(model[0].first, fastreg.nn.LayerNorm)
    assert isinstance(model[0].second, fastreg.nn.RMSNorm)
    undone = fastreg.revert(model)
    assert [item.name for item in undone.replaced] == names
    assert type(model[0].first) is nn.LayerNorm
    assert type(model[0].second) is nn.RMSNorm
    assert not any("fastreg" in key for module in model.modules() for key in vars(module))


def test_numbers_stay() -> None:
    model, input = make_model(), torch.randn(5, 16)
    expected = model(input)
    fastreg.convert(model)
    found = model(input)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    fastreg.revert(model)
    model.zero_grad()
    model(input).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_everything_else_stays_the_same_object() -> None:
    model = make_model().eval()
    model[0].first.train()
    called: list[str] = []
    model[0].first.register_forward_hook(lambda *_: called.append("hook"))
    modules, parameters = list(model.modules()), list(model.parameters())
    keys, modes = list(model.state_dict()), [module.training for module in modules]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for change in (fastreg.convert, fastreg.revert):
        change(model)
        assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
        assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
        assert list(model.state_dict()) == keys
        assert [module.training for module in modules] == modes
        before = model[0].first.weight.detach().clone()
        model(torch.randn(3, 16)).square().sum().backward()
        optimiser.step()
        assert not torch.equal(model[0].first.weight, before)
    assert called == ["hook", "hook"]


def test_a_layer_can_be_the_model() -> None:
    layer = nn.LayerNorm(4)
    report = fastreg.convert(layer)
    assert type(layer) is fastreg.nn.LayerNorm
    assert "(the model itself)" in str(report)


def test_a_shared_layer_is_replaced_once() -> None:
    shared = nn.LayerNorm(4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert len(fastreg.convert(model).replaced) == 1
    assert model[0] is model[2]
    fastreg.revert(model)
    assert type(shared) is nn.LayerNorm


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"include": "0.*"}, ["0.first", "0.second"]),
        ({"include": ["0.first", "2"]}, ["0.first", "2"]),
        ({"include": nn.RMSNorm}, ["0.second", "1.second"]),
        ({"include": lambda name, module: name.endswith("second")}, ["0.second", "1.second"]),
        ({"include": ["2", nn.RMSNorm]}, ["0.second", "1.second", "2"]),
        ({"exclude": "*.second"}, ["0.first", "1.first", "2"]),
        ({"exclude": [nn.LayerNorm]}, ["0.second", "1.second"]),
        ({"include": "0.*", "exclude": nn.RMSNorm}, ["0.first"]),
        ({"include": ()}, []),
    ],
    ids=str,
)
def test_selection(selection: dict[str, Any], expected: list[str]) -> None:
    model = make_model()
    report = fastreg.convert(model, **selection)
    assert [item.name for item in report.replaced] == expected
    assert len(report.replaced) + len(report.kept) == 5
    assert all(item.reason in ("excluded", "not selected by include") for item in report.kept)


@pytest.mark.parametrize("selection", [{"include": 3}, {"exclude": [3]}, {"include": [None]}], ids=str)
def test_a_bad_selector_is_refused_and_changes_nothing(selection: dict[str, Any]) -> None:
    model = make_model()
    with pytest.raises(TypeError, match=r"selector|iterable"):
        fastreg.convert(model, **selection)
    assert type(model[0].first) is nn.LayerNorm


@pytest.mark.parametrize("function", [fastreg.convert, fastreg.revert])
def test_only_modules_are_converted(function: Any) -> None:
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, got list"):
        function([nn.LayerNorm(3)])


def test_what_is_kept_is_listed_with_its_reason() -> None:
    patched = nn.LayerNorm(4)
    patched.forward = lambda input: input  # type: ignore[method-assign]
    model = nn.ModuleDict(
        {"special": Special(4), "ours": fastreg.nn.RMSNorm(4), "patched": patched, "plain": nn.LayerNorm(4)}
    )
    report = fastreg.convert(model)
    reasons = {item.name: item.reason for item in report.kept}
    assert list(reasons) == ["special", "ours", "patched"]
    assert "subclass of torch.nn.LayerNorm" in reasons["special"]
    assert "already fastreg's" in reasons["ours"]
    assert "forward was replaced on the instance" in reasons["patched"]
    text = str(report)
    assert text.startswith("1 module(s) replaced, 3 kept")
    assert "torch.nn.LayerNorm -> fastreg.nn.LayerNorm: plain" in text
    for name, reason in reasons.items():
        assert name in text
        assert reason in text
    assert type(model["ours"]) is fastreg.nn.RMSNorm
    fastreg.revert(model)
    assert type(model["ours"]) is fastreg.nn.RMSNorm


def test_converting_twice_and_reverting_twice() -> None:
    model = make_model()
    fastreg.convert(model)
    again = fastreg.convert(model)
    assert again.replaced == []
    assert len(again.kept) == 5
    assert len(fastreg.revert(model).replaced) == 5
    assert fastreg.revert(model).replaced == []
    assert type(model[2]) is nn.LayerNorm


def test_copies_of_a_converted_model_revert_too() -> None:
    model = make_model()
    fastreg.convert(model)
    input = torch.randn(3, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input), model(input))
        assert len(fastreg.revert(other).replaced) == 5
        assert type(other[0].first) is nn.LayerNorm
        assert type(model[0].first) is fastreg.nn.LayerNorm


def test_torchs_own_transformer_in_training_and_in_evaluation() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    input = torch.randn(2, 5, 16)
    for training in (True, False):
        model.train(training)
        expected = model(input)
        # Two norms and three dropouts a layer.
        assert len(fastreg.convert(model).replaced) == 10
        torch.testing.assert_close(model(input), expected)
        with torch.no_grad():
            torch.testing.assert_close(model(input), expected)
        fastreg.revert(model)


def test_a_converted_model_compiles_and_exports() -> None:
    model, input = make_model(), torch.randn(3, 16)
    expected = model(input)
    fastreg.convert(model)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(input), expected)
    torch.testing.assert_close(torch.export.export(model, (input,)).module()(input), expected)


def _as_if_installed(monkeypatch: pytest.MonkeyPatch, path: str) -> type[nn.Module]:
    """A norm over rows at ``path``; one whose name ends in 2d is channels-first."""
    name = path.rpartition(".")[2]

    def rows(self: Any, x: torch.Tensor) -> torch.Tensor:
        if "Rms" in name:
            return nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return rows(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if name.endswith("2d") else rows(self, x)

    return install(monkeypatch, path, nn.RMSNorm if "Rms" in name else nn.LayerNorm, forward=forward)


@pytest.mark.parametrize(
    "layer", [name for name in external._LAYERS if name not in {**external._FUSIONS, **external._RATES}]
)
def test_layers_of_other_libraries(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = _as_if_installed(monkeypatch, external._LAYERS[layer][0])
    monkeypatch.delitem(vars(external), layer, raising=False)
    first = nn.Conv2d(3, 8, 1) if layer.endswith("2d") else nn.Linear(3, 8)
    model = nn.Sequential(first, kind(8, eps=1e-3))
    shape = (2, 3, 4, 5) if layer.endswith("2d") else (2, 4, 5, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        input = torch.randn(shape).to(memory_format=layout)
        expected = model(input)
        (item,) = fastreg.convert(model).replaced
        assert (item.name, item.after.rpartition(".")[2]) == ("1", layer)
        assert isinstance(model[1], kind)
        found = pickle.loads(pickle.dumps(model))(input)
        torch.testing.assert_close(found, expected)
        assert found.stride() == expected.stride()
        assert len(fastreg.revert(model).replaced) == 1
        assert type(model[1]) is kind
    monkeypatch.delitem(vars(external), layer)


# --- batch norm -------------------------------------------------------------------------------------------


def batch_norms() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.Flatten(2),
        nn.BatchNorm1d(4, affine=False),
        nn.Unflatten(2, (5, 6, 1)),
        nn.BatchNorm3d(4, track_running_stats=False),
    )
    with torch.no_grad():
        model[1].weight.normal_()
        model[1].bias.normal_()
        model[1].running_mean.normal_()
    return model


@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_are_replaced_and_the_numbers_stay(training: bool) -> None:
    model, plain, input = (
        batch_norms().train(training),
        batch_norms().train(training),
        torch.randn(2, 3, 5, 6),
    )
    report = fastreg.convert(model)
    assert [item.after for item in report.replaced] == [f"fastreg.nn.BatchNorm{n}d" for n in (2, 1, 3)]
    for _ in range(2):
        found, expected = model(input), plain(input)
        torch.testing.assert_close(found, expected)
    slope = torch.randn_like(expected)
    found.backward(slope)
    expected.backward(slope)
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])
    fastreg.revert(model)
    assert [type(module) for module in model] == [type(module) for module in plain]


def test_synchronised_and_back() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), fastreg.nn.BatchNorm2d(3), fastreg.nn.BatchNormAct2d(3), nn.SyncBatchNorm(3)
    )
    before = [(type(module), list(vars(module))) for module in model]
    fastreg.convert(model)
    report = fastreg.convert(model, sync=True, process_group="a group")
    assert [item.after.rpartition(".")[2] for item in report.replaced] == [
        *("SyncBatchNorm", "SyncBatchNorm", "SyncBatchNormAct2d"),
    ]
    assert [module.process_group for module in model] == ["a group"] * 3 + [None]
    assert all(isinstance(module, nn.SyncBatchNorm) for module in model)
    fastreg.revert(model)
    assert [(type(module), list(vars(module))) for module in model] == before


def test_batch_norms_that_are_kept() -> None:
    class Own(nn.BatchNorm2d):
        """A subclass, which may compute something else."""

    model = nn.ModuleDict(
        {
            "own": Own(3),
            "lazy": nn.LazyBatchNorm2d(),
            "scripted": torch.jit.script(nn.BatchNorm2d(3)),
            "ours": fastreg.nn.BatchNormAct2d(3),
        }
    )
    reasons = {item.name: item.reason for item in fastreg.convert(model, fuse=True).kept}
    assert "subclass of torch.nn.BatchNorm2d" in reasons["own"]
    assert "lazy" in reasons["lazy"]
    assert "before torch.jit.script" in reasons["scripted"]
    assert "already fastreg's" in reasons["ours"]


def _timm_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """As timm writes it: norm, dropout, activation, all in one module."""
    return self.act(self.drop(nn.BatchNorm2d.forward(self, x)))


def _timm_init(self: Any, channels: int, act: nn.Module, drop: nn.Module) -> None:
    nn.BatchNorm2d.__init__(self, channels)
    self.act, self.drop = act, drop


@pytest.mark.parametrize(
    ("act", "drop", "calls"),
    [
        (nn.SiLU(inplace=True), nn.Identity(), ["silu"]),
        (nn.Mish(), nn.Identity(), [None]),
        (nn.ReLU(), nn.Dropout(0.0), [None]),
        (nn.Identity(), nn.Identity(), ["identity"]),
    ],
    ids=str,
)
def test_timms_norm_with_an_activation(
    act: nn.Module, drop: nn.Module, calls: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external._LAYERS["TimmBatchNormAct2d"][0]
    kind = install(monkeypatch, path, nn.BatchNorm2d, forward=_timm_forward, __init__=_timm_init)
    monkeypatch.delitem(vars(external), "TimmBatchNormAct2d", raising=False)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4, act, drop))  # type: ignore[call-arg]
    plain, input = copy.deepcopy(model), torch.randn(2, 3, 5, 5)
    asked: list[str | None] = []
    original = external.batch_norm_of

    def batch_norm_of(layer: Any, x: Any, residual: Any = None, activation: Any = None, *rest: Any) -> Any:
        asked.append(activation)
        return original(layer, x, residual, activation, *rest)

    monkeypatch.setattr(external, "batch_norm_of", batch_norm_of)
    item = fastreg.convert(model).replaced[0]
    assert item.after.rpartition(".")[2] == "TimmBatchNormAct2d"
    torch.testing.assert_close(model(input), plain(input))
    assert asked == calls
    seen: list[int] = []
    model[1].act.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(input), plain(input))
    assert seen == [1]
    fastreg.revert(model)
    assert type(model[1]) is kind


def test_timms_norm_without_an_activation_is_fused_with_an_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    path = external._LAYERS["TimmBatchNormAct2d"][0]
    kind = install(monkeypatch, path, nn.BatchNorm2d, forward=_timm_forward, __init__=_timm_init)
    monkeypatch.delitem(vars(external), "TimmBatchNormAct2d", raising=False)

    class Residual(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.norm = kind(4, act, nn.Identity())  # type: ignore[call-arg]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + x.sigmoid()

    input = torch.randn(2, 4, 5, 5)
    for act, expected in ((nn.Identity(), ["norm + add"]), (nn.ReLU(), [])):
        model = Residual(act)
        plain = copy.deepcopy(model)
        assert [item.what for item in fastreg.convert(model, fuse=True).fused] == expected
        torch.testing.assert_close(model(input), plain(input))


class Frozen(nn.Module):
    """torchvision's FrozenBatchNorm2d: nothing but buffers."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, mean, variance = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        scale = weight * (variance + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchvisions_frozen_norm(input_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = install(monkeypatch, external._LAYERS["TorchvisionFrozenBatchNorm2d"][0], Frozen)
    monkeypatch.delitem(vars(external), "TorchvisionFrozenBatchNorm2d", raising=False)
    model: Any = nn.Sequential(kind(4), nn.ReLU())  # type: ignore[call-arg]
    plain, input = copy.deepcopy(model), torch.randn(2, 4, 5, 5, dtype=input_dtype, requires_grad=True)
    report = fastreg.convert(model, fuse=True)
    assert [item.what for item in report.fused] == ["norm + relu"]
    # bfloat16 with float32 buffers is float32 there.
    torch.testing.assert_close(model(input), plain(input))
    fastreg.revert(model)
    assert type(model[0]) is kind
