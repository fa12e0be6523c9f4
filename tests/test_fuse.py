"""convert(fuse=True): a model is fused, selected from, changed and reverted, and stays what it was."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastreg
from fastreg.fuse.classes import ORIGINAL
from fastreg.nn import _fused
from fuse_examples import (
    FUSED,
    Basic,
    Head,
    X,
    assert_same,
    conv,
    count_calls,
    fused_names,
    make,
    randomise,
    reasons,
)

pytestmark = pytest.mark.backend_independent


# --- the whole model --------------------------------------------------------------------------------------


def test_everything_that_can_be_is_fused_and_the_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = make(), make()
    report = fastreg.convert(model, fuse=True)
    assert {item.name: item.what for item in report.fused} == FUSED
    assert [item.name for item in report.alone] == ["layer1.1.downsample.1"]
    assert len(report.replaced) == len(FUSED) + 1
    calls = count_calls(monkeypatch)
    model.eval()(X)
    assert len(calls) == len(FUSED)
    assert sum(residual for residual, _ in calls) == sum("add" in what for what in FUSED.values())
    monkeypatch.undo()
    assert_same(model, plain, X)
    assert_same(model, plain, X.to(memory_format=torch.channels_last))


def test_bfloat16_and_double() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model, plain = make().to(dtype), make().to(dtype)
        fastreg.convert(model, fuse=True)
        found, expected = model.eval()(X.to(dtype)), plain.eval()(X.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0.1 if dtype == torch.bfloat16 else 1e-12, atol=0.1)


def test_the_report_says_it() -> None:
    text = str(fastreg.convert(make(), fuse=True))
    assert text.splitlines()[0] == "20 module(s) replaced, 0 kept, 19 fused with what follows"
    assert "3 x norm + add + relu in one kernel: " in text
    assert "1 x norm alone, neither an addition nor an activation follows it: layer1.1.downsample.1" in text
    assert "fused" not in str(fastreg.convert(make()))


def test_revert_restores_every_class_and_leaves_nothing() -> None:
    model, plain = make(), make()
    before = [(type(module), list(vars(module))) for module in model.modules()]
    fastreg.convert(model, fuse=True)
    assert type(model.layer1[0]) is not Basic
    assert isinstance(model.layer1[0], Basic)
    fastreg.revert(model)
    assert [(type(module), list(vars(module))) for module in model.modules()] == before
    assert torch.equal(model(X), plain(X))


def test_converting_first_and_fusing_later() -> None:
    model = make()
    fastreg.convert(model)
    report = fastreg.convert(model, fuse=True)
    assert {item.name for item in report.fused} == set(FUSED)
    again = fastreg.convert(model, fuse=True)
    assert again.fused == []
    assert any("fused already" in item.reason for item in again.alone)
    fastreg.revert(model)
    assert type(model.stem[1]) is nn.BatchNorm2d
    assert not any(ORIGINAL in vars(module) for module in model.modules())


def _through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _through_torch_save, copy.copy],
    ids=["deepcopy", "pickle", "torch.save", "copy"],
)
def test_copies_stay_fused_and_revert(copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().eval()
    fastreg.convert(model, fuse=True)
    other = copied(model)
    calls = count_calls(monkeypatch)
    assert torch.equal(other(X), model(X))
    assert len(calls) == 2 * len(FUSED)
    assert type(other.layer1[0]) is type(model.layer1[0])
    fastreg.revert(other)
    assert type(other.layer1[0]) is Basic


def test_state_dicts_go_both_ways() -> None:
    model, plain = make(), make()
    fastreg.convert(model, fuse=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(X), plain.eval()(X))
    model.load_state_dict(make().state_dict(), assign=True)
    assert type(model.layer1[0]) is not Basic


@pytest.mark.parametrize("training", [True, False])
def test_a_fused_model_compiles(training: bool) -> None:
    model = make().train(training)
    fastreg.convert(model, fuse=True)
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, expected = compiled(X), other(X)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(model.stem[0].weight.grad, other.stem[0].weight.grad, rtol=1e-3, atol=1e-3)
    assert type(model.layer1[0]) is type(other.layer1[0])


def test_a_fused_model_exports_and_traces() -> None:
    model = make().eval()
    expected = model(X)
    fastreg.convert(model, fuse=True)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, (X,), check_trace=False)(X), expected)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)

    # To torch.fx the model is what it was: norms, additions and activations are nodes of their own.
    graph = Tracer().trace(model)
    torch.testing.assert_close(torch.fx.GraphModule(model, graph)(X), expected)
    assert not any(node.target is _fused.then for node in graph.nodes)


# --- selection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "layer1.*"}, [name for name in FUSED if name.startswith("layer1.")]),
        ({"exclude": "layer1.0.bn1"}, [name for name in FUSED if name != "layer1.0.bn1"]),
        ({"exclude": "layer1.0"}, [name for name in FUSED if not name.startswith("layer1.0.")]),
        ({"exclude": Basic}, [name for name in FUSED if not name.startswith("layer1.")]),
        ({"exclude": nn.GELU}, [name for name in FUSED if name != "stem.1"]),
        ({"include": ()}, []),
    ],
    ids=str,
)
def test_selection(options: dict[str, Any], expected: list[str]) -> None:
    model, plain = make(), make()
    assert set(fused_names(model, **options)) == set(expected)
    assert_same(model, plain, X)


def test_an_excluded_activation_leaves_the_addition() -> None:
    found = fused_names(make(), exclude=nn.ReLU)
    assert found["layer1.0.bn2"] == "norm + add"
    assert "layer1.0.bn1" not in found


def test_norms_that_were_ours_are_not_fused_where_they_are_not_selected() -> None:
    model = nn.Sequential(conv(3, 4), fastreg.nn.BatchNorm2d(4), nn.ReLU())
    assert reasons(model, exclude="1")["1"].endswith("not selected")
    assert type(model) is nn.Sequential


# --- what happens after the conversion --------------------------------------------------------------------


@pytest.mark.parametrize("watched", ["bn1", "relu", "bn2"])
def test_a_hook_that_comes_later_sees_what_it_would_have_seen(watched: str) -> None:
    model, plain = randomise(Basic(4, 4)), randomise(Basic(4, 4))
    plain.load_state_dict(model.state_dict())
    fastreg.convert(model, fuse=True)
    seen: dict[nn.Module, list[torch.Tensor]] = {model: [], plain: []}
    handles = [
        each.get_submodule(watched).register_forward_hook(
            lambda _, inputs, output, own=own: own.append(output.clone())
        )
        for each, own in seen.items()
    ]
    x = torch.randn(2, 4, 5, 5)
    assert_same(model, plain, x)
    assert len(seen[model]) == len(seen[plain]) > 0
    for found, expected in zip(seen[model], seen[plain], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert_same(model, plain, x)


def test_global_hooks_fire_for_every_module() -> None:
    model = randomise(Basic(4, 4))
    fastreg.convert(model, fuse=True)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    model(torch.randn(2, 4, 5, 5))
    handle.remove()
    assert seen.count(model.relu) == 2
    assert {model.bn1, model.bn2} <= set(seen)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "relu", nn.GELU()),
        lambda model: setattr(model, "downsample", nn.Sequential(nn.Conv2d(4, 4, 1))),
        lambda model: setattr(model, "bn1", nn.Identity()),
        lambda model: model.add_module("bn2", nn.InstanceNorm2d(4)),
    ],
    ids=["activation", "branch", "norm", "add_module"],
)
def test_a_module_that_is_changed_later_does_what_it_then_says(change: Any) -> None:
    model, plain = randomise(Basic(4, 4)), randomise(Basic(4, 4))
    plain.load_state_dict(model.state_dict())
    fastreg.convert(model, fuse=True)
    for each in (model, plain):
        torch.manual_seed(3)
        change(each)
    assert_same(model, plain, torch.randn(2, 4, 5, 5))


def test_a_changed_number_counts_too_and_an_unknown_attribute_does_not() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scale = nn.BatchNorm2d(3), 2.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.norm(x)) * self.scale

    model = Scaled().eval()
    fastreg.convert(model, fuse=True)
    model.note = "nobody reads it"
    assert type(model) is not Scaled
    x = torch.randn(2, 3, 4, 4)
    before = model(x)
    model.scale = 4.0
    assert type(model) is Scaled
    torch.testing.assert_close(model(x), 2 * before)


def test_a_sequence_may_grow_shrink_and_be_cut() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.SiLU()).eval()
    plain = copy.deepcopy(model)
    fastreg.convert(model, fuse=True)
    x = torch.randn(5, 4)
    for change in (
        lambda each: each,
        lambda each: each.append(nn.Tanh()),
        lambda each: each.insert(1, nn.Softplus()),
        lambda each: each[1:4],
        lambda each: each[::-1],
    ):
        torch.testing.assert_close(change(model)(x), change(plain)(x))
    del model[1], plain[1]
    torch.testing.assert_close(model(x), plain(x))


def test_arguments_that_the_graph_was_not_made_for() -> None:
    model, plain = randomise(Head(4)), randomise(Head(4))
    plain.load_state_dict(model.state_dict())
    fastreg.convert(model, fuse=True)
    x = torch.randn(3, 4, 5, 5)
    assert_same(model, plain, x, 3.0)
    assert_same(model, plain, x, scale=0.5)
    torch.testing.assert_close(model(x=x), model(x))


def test_a_copy_for_another_device_stays_fused() -> None:
    model = randomise(Basic(4, 4)).eval()
    fastreg.convert(model, fuse=True)
    replica = model._replicate_for_data_parallel()
    assert type(replica) is type(model)
    assert type(model) is not Basic


def test_a_module_can_be_made_again_from_its_class() -> None:
    model = Basic(4, 4)
    fastreg.convert(model, fuse=True)
    other = type(model)(3, 5)
    assert type(other) is Basic
    assert other(torch.randn(2, 3, 4, 4)).shape == (2, 5, 4, 4)


# --- synchronised -----------------------------------------------------------------------------------------


def test_synchronised_norms_are_fused_too() -> None:
    model, plain = make(), make()
    report = fastreg.convert(model, fuse=True, sync=True)
    assert {item.name: item.what for item in report.fused} == FUSED
    assert all(item.after == "fastreg.nn.SyncBatchNorm" for item in report.replaced)
    assert_same(model, plain, X)
    fastreg.revert(model)
    assert type(model.stem[1]) is nn.BatchNorm2d
