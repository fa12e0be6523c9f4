"""convert on the dropout family: torch's layers, and (as stand-ins of the same names) torchvision's and timm's.

What is converted draws what fastreg's functions draw from the same state of torch's generator.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastreg
import fastreg.functional as ours
from fastreg.nn import external
from stand_in_layers import install

pytestmark = pytest.mark.backend_independent

X = torch.randn(6, 4, 10, 9, generator=torch.Generator().manual_seed(0))


def drawn(function: Callable[[torch.Tensor], torch.Tensor], input: torch.Tensor = X) -> torch.Tensor:
    """The function's value, from a known state of the generator."""
    torch.manual_seed(3)
    return function(input.clone())


# --- torch's ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("kind", "function", "shape"),
    [
        (nn.Dropout, ours.dropout, (40, 9)),
        (nn.Dropout1d, ours.dropout1d, (6, 8, 5)),
        (nn.Dropout2d, ours.dropout2d, (6, 8, 5, 3)),
        (nn.Dropout3d, ours.dropout3d, (6, 8, 2, 5, 3)),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_torchs_dropouts(kind: Any, function: Any, shape: tuple[int, ...], inplace: bool) -> None:
    model: Any = nn.Sequential(nn.Identity(), kind(0.4, inplace))
    input = torch.randn(shape)
    (item,) = fastreg.convert(model).replaced
    assert (item.name, item.before) == ("1", f"torch.nn.{kind.__name__}")
    assert item.after == f"fastreg.nn.{kind.__name__}"
    assert isinstance(model[1], kind)
    assert torch.equal(drawn(model, input), drawn(lambda x: function(x, 0.4), input))
    given = input.clone()
    output = model(given)
    assert (output is given) == inplace
    assert model.eval()(given) is given
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(drawn(other.train(), input), drawn(model.train(), input))
    fastreg.revert(model)
    assert type(model[1]) is kind
    assert vars(model[1]).keys() == vars(kind(0.4)).keys()


def test_the_masks_are_others_of_the_same_rate_and_scale() -> None:
    model, input = nn.Dropout(0.3), torch.ones(200, 500)
    expected = drawn(model, input)
    fastreg.convert(model)
    found = drawn(model, input)
    assert not torch.equal(found, expected)
    assert abs(float((found == 0).float().mean()) - 0.3) < 0.01
    torch.testing.assert_close(found.max(), expected.max(), rtol=1e-4, atol=0)


def test_what_is_kept_and_why() -> None:
    class Own(nn.Dropout2d):
        """A subclass, which may compute something else."""

    patched = nn.Dropout(0.1)
    patched.forward = lambda input: input  # type: ignore[method-assign]
    model = nn.ModuleDict(
        {
            "own": Own(0.1),
            "patched": patched,
            "ours": fastreg.nn.DropPath(0.1),
            "block": fastreg.nn.DropBlock2d(0.1, 3),
            "added": fastreg.nn.DropoutAdd(0.1),
            "scripted": torch.jit.script(nn.Dropout(0.1)),
            "plain": nn.Dropout(0.1),
            "alpha": nn.AlphaDropout(0.1),
        }
    )
    report = fastreg.convert(model, exclude="plain")
    reasons = {item.name: item.reason for item in report.kept}
    assert report.replaced == []
    assert reasons.keys() == model.keys() - {"alpha"}
    assert "subclass of torch.nn.Dropout2d" in reasons["own"]
    assert "forward was replaced on the instance" in reasons["patched"]
    assert all("already fastreg's" in reasons[name] for name in ("ours", "block", "added"))
    assert "before torch.jit.script" in reasons["scripted"]
    assert reasons["plain"] == "excluded"


def test_gradients_go_where_the_mask_lets_them() -> None:
    model = nn.Sequential(nn.Dropout2d(0.5), nn.Dropout(0.2))
    fastreg.convert(model)
    input = X.clone().requires_grad_()
    output = model(input)
    output.sum().backward()
    assert input.grad is not None
    torch.testing.assert_close(input.grad * X, output.detach())


# --- torchvision's and timm's -----------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, layer: str, **attributes: Any) -> Any:
    """A layer of the library's name and attributes, whose own forward is to be noticed."""

    def initialise(self: Any) -> None:
        nn.Module.__init__(self)
        vars(self).update(attributes)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 7

    path = external._LAYERS[layer][0]
    kind = install(monkeypatch, path, nn.Module, __init__=initialise, forward=forward)
    monkeypatch.delitem(vars(external), layer, raising=False)
    return kind()  # type: ignore[call-arg]


BLOCKS = {"seeds": "anywhere", "shared": True}
LAYERS: list[tuple[str, dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = [
    (
        "TorchvisionDropBlock2d",
        {"p": 0.2, "block_size": 3, "inplace": False, "eps": 1e-6},
        lambda x: ours.drop_block2d(x, 0.2, 3),
    ),
    (
        "TorchvisionDropBlock3d",
        {"p": 0.2, "block_size": 2, "inplace": True, "eps": 1e-6},
        lambda x: ours.drop_block3d(x, 0.2, 2),
    ),
    (
        "TorchvisionStochasticDepth",
        {"p": 0.5, "mode": "row"},
        lambda x: ours.drop_path(x, 0.5),
    ),
    (
        "TorchvisionStochasticDepth",
        {"p": 0.5, "mode": "batch"},
        lambda x: ours.drop_path(x, 0.5, mode="batch"),
    ),
    (
        "TimmDropPath",
        {"drop_prob": 0.5, "scale_by_keep": True},
        lambda x: ours.drop_path(x, 0.5),
    ),
    (
        "TimmDropPath",
        {"drop_prob": 0.5, "scale_by_keep": False},
        lambda x: ours.drop_path(x, 0.5, scale_by_keep=False),
    ),
    (
        "TimmDropBlock2d",
        {"drop_prob": 0.2, "block_size": 3},
        lambda x: ours.drop_block2d(x, 0.2, (3, 3), **BLOCKS),
    ),
    (
        # Cut to 10 by 9: in torchvision it would be 9 by 9.
        "TimmDropBlock2d",
        {"drop_prob": 0.2, "block_size": 12, "gamma_scale": 0.5, "inplace": True},
        lambda x: ours.drop_block2d(x, 0.1, (10, 9), **BLOCKS),
    ),
    (
        "TimmDropBlock2d",
        {"drop_prob": 0.2, "block_size": 2, "couple_channels": False, "scale_by_keep": False},
        lambda x: ours.drop_block2d(x, 0.2, (2, 2), seeds="anywhere", rescale=None),
    ),
]
DEFAULTS = {
    "TimmDropBlock2d": {
        "gamma_scale": 1.0,
        "with_noise": False,
        "inplace": False,
        "couple_channels": True,
        "scale_by_keep": True,
    }
}


@pytest.mark.parametrize(("layer", "attributes", "function"), LAYERS, ids=str)
def test_layers_of_other_libraries(
    layer: str, attributes: dict[str, Any], function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributes = {**DEFAULTS.get(layer, {}), **attributes}
    model: Any = nn.Sequential(stand_in(monkeypatch, layer, **attributes))
    kind = type(model[0])
    input = torch.randn(3, 2, 4, 5, 6) if layer.endswith("3d") else X
    (item,) = fastreg.convert(model).replaced
    assert (item.before, item.after) == (external._LAYERS[layer][0], f"fastreg.nn.{layer}")
    assert isinstance(model[0], kind)
    expected = drawn(function, input)
    assert torch.equal(drawn(model, input), expected)
    assert torch.equal(drawn(pickle.loads(pickle.dumps(model)), input), expected)
    given = input.clone()
    assert (model(given) is given) == attributes.get("inplace", False)
    assert model.eval()(given) is given
    fastreg.revert(model)
    assert type(model[0]) is kind
    monkeypatch.delitem(vars(external), layer)


@pytest.mark.parametrize("attributes", [{"with_noise": True}, {"gamma_scale": 6.0}], ids=str)
def test_timms_own_forward_where_no_kernel_does_it(
    attributes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**DEFAULTS["TimmDropBlock2d"], "drop_prob": 0.2, "block_size": 3, **attributes}
    layer = stand_in(monkeypatch, "TimmDropBlock2d", **values)
    assert len(fastreg.convert(layer).replaced) == 1
    assert torch.equal(layer(X), X * 7)


def test_a_subclass_of_another_librarys_layer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(stand_in(monkeypatch, "TimmDropPath"))
    own = type("Own", (kind,), {})()
    (item,) = fastreg.convert(own).kept
    assert "a subclass of timm.layers.drop.DropPath" in item.reason


# --- rates in tensors -------------------------------------------------------------------------------------


def test_a_schedule_moves_the_rates_of_converted_layers_and_revert_leaves_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = stand_in(monkeypatch, "TimmDropPath", drop_prob=0.1, scale_by_keep=True)
    depth = stand_in(monkeypatch, "TorchvisionStochasticDepth", p=0.1, mode="row")
    model = nn.Sequential(path, depth, nn.Dropout(0.1), nn.Linear(9, 9))
    keys = list(model.state_dict())
    fastreg.convert(model)
    schedule = fastreg.nn.LinearSchedule(model, 0.0, 1.0, steps=4)
    assert torch.equal(model(X), model[3](X))
    for _ in range(3):
        schedule.step()
    expected = drawn(lambda x: ours.drop_path(x, 0.75))
    assert torch.equal(drawn(path), expected)
    assert torch.equal(drawn(depth), expected)
    schedule.step()
    model.bfloat16()
    assert path.drop_prob.dtype == torch.float64
    assert not model[:3](X.bfloat16()).any()
    assert "drop_prob=1.0" in str(model)
    assert list(model.state_dict()) == keys
    # A tensor is not looked at, not even where it is of no use.
    assert model[:3].eval()(X) is X
    fastreg.revert(model)
    assert [path.drop_prob, depth.p, model[2].p] == [1.0] * 3
    assert not model[2].train()(X).any()


def test_a_rate_in_a_tensor_reaches_drop_block(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**DEFAULTS["TimmDropBlock2d"], "drop_prob": 0.2, "block_size": 3, "gamma_scale": 0.5}
    layer = stand_in(monkeypatch, "TimmDropBlock2d", **values)
    fastreg.convert(layer)
    fastreg.nn.LinearSchedule(layer, 0.4, 0.4, steps=1)
    assert torch.equal(drawn(layer), drawn(lambda x: ours.drop_block2d(x, 0.2, (3, 3), **BLOCKS)))


def test_numbers_of_norms_stay_beside_dropouts_that_sleep() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout2d(0.5), nn.Dropout(0.0))
    plain = copy.deepcopy(model)
    assert len(fastreg.convert(model).replaced) == 3
    for each in (model, plain):
        each[2].eval()
    torch.testing.assert_close(model(X), plain(X))
