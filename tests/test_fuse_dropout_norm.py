"""convert(fuse=True) on dropout + add + norm: which forms are one kernel, and what is decided in each call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastreg
from fastreg.nn import _fused, external
from stand_in_layers import install
from test_fuse_dropout import X, assert_same, both

pytestmark = pytest.mark.backend_independent


class Form(nn.Module):
    """Dropouts, norms of rows, and a forward that is a function of the test's."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.a, self.path = nn.Dropout(0.5), fastreg.nn.DropPath(0.5)
        self.layer, self.rms, self.all = nn.LayerNorm(8), nn.RMSNorm(8), nn.LayerNorm((6, 5, 8))
        self.batch = nn.BatchNorm1d(5, track_running_stats=False)
        self.lift, self.nothing = nn.Linear(8, 8), nn.Identity()
        self.sequence = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4))
        for norm in (self.layer, self.rms, self.all):
            nn.init.normal_(norm.weight)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def _post_norm(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.layer(x + m.a(m.lift(x)))


def _pre_norm(m: Form, x: torch.Tensor) -> torch.Tensor:
    x = x + m.path(m.lift(x))
    return x + m.lift(m.rms(x))


def _sum_is_used_before(m: Form, x: torch.Tensor) -> torch.Tensor:
    x = m.a(m.lift(x)) + x
    y = x.sigmoid() * x
    return m.layer(x) + y


def _two_norms(m: Form, x: torch.Tensor) -> torch.Tensor:
    x = x + m.a(m.lift(x))
    return m.layer(x) * m.rms(x)


def _behind_a_sequence(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.rms(m.nothing(m.sequence(x)) + x)


def _in_place(m: Form, x: torch.Tensor) -> torch.Tensor:
    y = m.a(m.lift(x))
    y += x
    return m.layer(y)


def _sum_is_written(m: Form, x: torch.Tensor) -> torch.Tensor:
    x = x + m.a(m.lift(x))
    x.mul_(2)
    return m.layer(x)


def _view_of_the_sum_is_written(m: Form, x: torch.Tensor) -> torch.Tensor:
    x = x + m.a(m.lift(x))
    x[0].add_(1)
    return m.layer(x)


def _sum_is_written_afterwards(m: Form, x: torch.Tensor) -> torch.Tensor:
    with_residual = x + m.a(m.lift(x))
    y = m.layer(with_residual).sigmoid()
    return torch.add(with_residual, y)


def _all_dimensions(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.all(x + m.a(m.lift(x)))


def _another_norm(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.batch(x + m.a(m.lift(x)))


def _of_the_branch(m: Form, x: torch.Tensor) -> torch.Tensor:
    return x + m.layer(m.a(m.lift(x)))


def _of_a_view(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.layer((x + m.a(m.lift(x))).flatten(0, 1))


def _other_layout(m: Form, x: torch.Tensor) -> torch.Tensor:
    y = x.transpose(0, 1)
    return m.layer(m.a(y) + y.sigmoid())


THREE, PATH = "dropout + add + norm", "drop path + add + norm"
FORMS: list[tuple[Callable[..., torch.Tensor], dict[str, str], bool]] = [
    (_post_norm, {"a": THREE}, True),
    (_pre_norm, {"path": PATH}, True),
    (_sum_is_used_before, {"a": THREE}, True),
    (_two_norms, {"a": THREE}, True),
    (_behind_a_sequence, {"sequence.1": THREE}, True),
    (_in_place, {"a": THREE}, True),
    (_sum_is_written, {"a": "dropout + add"}, False),
    (_view_of_the_sum_is_written, {"a": "dropout + add"}, False),
    (_sum_is_written_afterwards, {"a": THREE}, True),
    # One row, without a dimension of rows.
    (_all_dimensions, {"a": THREE}, False),
    (_another_norm, {"a": "dropout + add"}, False),
    (_of_the_branch, {}, False),
    (_of_a_view, {"a": "dropout + add"}, False),
    # Elements are not counted row by row there.
    (_other_layout, {"a": THREE}, False),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The norms that ran in one kernel with what is before them, from now on."""
    found: list[str] = []
    for kind, kernel in list(_fused._NORMS.items()):

        def noted(norm: Any, *arguments: Any, kernel: Any = kernel, **options: Any) -> Any:
            found.append(type(norm).__name__)
            return kernel(norm, *arguments, **options)

        monkeypatch.setitem(_fused._NORMS, kind, noted)
    return found


@pytest.mark.parametrize(
    ("function", "expected", "one"), FORMS, ids=lambda each: getattr(each, "__name__", "")
)
def test_forms(
    function: Callable[..., torch.Tensor], expected: dict[str, str], one: bool, calls: list[str]
) -> None:
    model, unfused, fused = both(Form(function))
    assert fused == expected
    assert_same(model, unfused, X)
    # In training once, in evaluation not at all.
    assert len(calls) == one
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        del calls[:]
        assert_same(other, unfused, X)
        assert len(calls) == one


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_layers_of_libraries(kind: str, monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    class Path(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop_prob, self.scale_by_keep, self.p, self.mode = 0.5, False, 0.5, "batch"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    names = {"timm": ("TimmDropPath", "TimmLayerNorm"), "torchvision": ("TorchvisionStochasticDepth",)}[kind]
    made = [
        install(monkeypatch, external._LAYERS[name][0], base)
        for name, base in zip(names, (Path, nn.LayerNorm), strict=False)
    ]
    for name in names:
        monkeypatch.delitem(vars(external), name, raising=False)
    form = Form(_pre_norm)
    form.path = made[0]()
    form.rms = made[1](8) if kind == "timm" else form.rms
    model, unfused, fused = both(form)
    assert fused == {"path": PATH}
    if kind == "timm":
        kernel = _fused._NORMS[type(model.rms)]
        monkeypatch.setitem(
            _fused._NORMS,
            type(model.rms),
            lambda *given, **named: calls.append("") or kernel(*given, **named),
        )
    assert_same(model, unfused, X)
    assert len(calls) == 1


def test_a_call_is_one_kernel_only_where_that_changes_nothing(calls: list[str]) -> None:
    model, unfused, _ = both(Form(_post_norm))

    def check(one: bool, x: torch.Tensor = X, rtol: float = 1e-5) -> None:
        del calls[:]
        found = []
        for each in (model, unfused):
            torch.manual_seed(1)
            found.append(each(x))
        torch.testing.assert_close(*found, rtol=rtol, atol=rtol)
        assert len(calls) == one

    check(True)
    model.a.p = unfused.a.p = torch.tensor(0.25, dtype=torch.float64)
    check(True)
    model.a.p = unfused.a.p = 0.0
    check(False)
    model.a.p = unfused.a.p = 0.5
    # The sum is wider than the branch.
    for each in (model, unfused):
        each.lift.bfloat16()
        each.function = lambda m, x: m.layer(x.float() + m.a(m.lift(x)))
    fastreg.revert(model)
    fastreg.convert(model, fuse=True)
    check(False, X.bfloat16(), 0.02)
    model, unfused, _ = both(Form(_post_norm))
    seen: list[torch.Tensor] = []
    for each in (model, unfused):
        each.layer.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].detach().clone()))
    check(False)
    assert torch.equal(*seen)
    model, unfused, _ = both(Form(_post_norm))
    for each in (model, unfused):
        each.layer = nn.Sequential(nn.LayerNorm(8), nn.Tanh())
    check(False)


def test_selection() -> None:
    assert both(Form(_post_norm), exclude="layer")[2] == {"a": "dropout + add"}
    assert both(Form(_post_norm), exclude="a")[2] == {}
    hooked = Form(_post_norm)
    hooked.layer.register_forward_hook(lambda *_: None)
    assert both(hooked)[2] == {"a": "dropout + add"}


def test_it_compiles(calls: list[str]) -> None:
    model, _, _ = both(Form(_pre_norm))
    torch.manual_seed(1)
    expected = model(X)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(X), expected)
