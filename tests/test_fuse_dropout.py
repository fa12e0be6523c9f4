"""convert(fuse=True) on the dropout family: dropout + add in one kernel, and what it must not change.

A fused model is compared with one that is converted but not fused: from the same state of torch's generator both draw
the same masks.
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
from fastreg.nn import _fused, external
from stand_in_layers import install

pytestmark = pytest.mark.backend_independent


class Path(nn.Module):
    """timm's DropPath, for a library that is not installed."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Depth(nn.Module):
    """torchvision's StochasticDepth."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The two layers, where convert looks for them."""
    found: dict[str, Any] = {}
    for name, base in (("TimmDropPath", Path), ("TorchvisionStochasticDepth", Depth)):
        found[base.__name__] = install(monkeypatch, external._LAYERS[name][0], base)
        monkeypatch.delitem(vars(external), name, raising=False)
    return found


class Encoder(nn.Module):
    """A block of a vision transformer as torchvision writes it, without the attention."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.ln_1, self.mix, self.dropout = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(p)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(p), nn.Linear(2 * width, width), nn.Dropout(p)
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        torch._assert(input.dim() == 3, f"Expected (batch, length, width) got {input.shape}")
        x = self.dropout(self.mix(self.ln_1(input)))
        x = x + input
        return x + self.mlp(self.ln_2(x))


class Scaled(nn.Module):
    """A block of a vision transformer as timm writes it."""

    def __init__(self, width: int, path: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = nn.LayerNorm(width), nn.Linear(width, width), path()
        self.norm2, self.mlp, self.drop_path2 = nn.LayerNorm(width), nn.Linear(width, width), path()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Convolutional(nn.Module):
    """ConvNeXt's block as torchvision writes it: ``+=`` behind the stochastic depth."""

    def __init__(self, width: int, depth: nn.Module) -> None:
        super().__init__()
        self.block, self.stochastic_depth = nn.Conv1d(width, width, 3, padding=1), depth
        self.layer_scale = nn.Parameter(torch.full((width, 1), 0.5))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        result = self.layer_scale * self.block(input)
        result = self.stochastic_depth(result)
        result += input
        return result


def make(libraries: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        Encoder(8, 0.3),
        Scaled(8, lambda: libraries["Path"](0.4)),
        Scaled(8, lambda: fastreg.nn.DropPath(0.4, scale_by_keep=False, mode="batch")),
        Convolutional(5, libraries["Depth"](0.5, "row")),
    )


FUSED = {
    "0.dropout": "dropout + add + norm",
    "0.mlp.4": "dropout + add",
    **{f"{block}.drop_path1": "drop path + add + norm" for block in (1, 2)},
    **{f"{block}.drop_path2": "drop path + add" for block in (1, 2)},
    "3.stochastic_depth": "drop path + add",
}
X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))


def both(model: nn.Module, **options: Any) -> tuple[Any, Any, dict[str, str]]:
    """The model fused, the model converted only, and what is fused."""
    unfused = copy.deepcopy(model)
    fastreg.convert(unfused)
    report = fastreg.convert(model, fuse=True, **options)
    return model, unfused, {item.name: item.what for item in report.fused}


def assert_same(model: nn.Module, unfused: nn.Module, *inputs: torch.Tensor) -> None:
    """Outputs, what becomes of the inputs, and gradients, in both modes and from the same random numbers."""
    for training in (True, False):
        results = []
        for each in (model, unfused):
            each.train(training)
            each.zero_grad()
            torch.manual_seed(5)
            leaves = [x.clone().requires_grad_() for x in inputs]
            given = [leaf * 1 for leaf in leaves]
            output = each(*given)
            output.square().sum().backward()
            gradients = [x.grad for x in (*leaves, *each.parameters())]
            results.append((output, given, gradients, torch.get_rng_state()))
        assert results[0][0].dtype == results[1][0].dtype
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def count_calls(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> list[Any]:
    """What every call of the kernel of a type of layer returned from now on."""
    outputs: list[Any] = []
    fusion = _fused._FUSIONS[kind]

    def kernel(*arguments: Any) -> Any:
        outputs.append(fusion.kernel(*arguments))
        return outputs[-1]

    monkeypatch.setitem(
        _fused._FUSIONS, kind, _fused.Fusion(kernel, fusion.ready, activates=False, name=fusion.name)
    )
    return outputs


# --- the whole model --------------------------------------------------------------------------------------


def test_every_dropout_in_front_of_an_addition_is_fused(libraries: dict[str, Any]) -> None:
    model, unfused, fused = both(make(libraries))
    assert fused == FUSED
    assert_same(model, unfused, X)
    plain = make(libraries)
    torch.testing.assert_close(model.eval()(X), plain.eval()(X))
    before = [type(module) for module in plain.modules()]
    fastreg.revert(model)
    assert [type(module) for module in model.modules()] == before


def test_the_report_says_it_and_is_silent_about_other_dropouts(libraries: dict[str, Any]) -> None:
    report = fastreg.convert(make(libraries), fuse=True)
    assert report.alone == []
    text = str(report)
    assert "7 fused with what follows" in text
    assert "1 x dropout + add in one kernel: 0.mlp.4" in text
    assert "1 x dropout + add + norm in one kernel: 0.dropout" in text
    assert "3 x drop path + add in one kernel: " in text
    assert "2 x drop path + add + norm in one kernel: " in text


def test_copies_stay_fused(libraries: dict[str, Any]) -> None:
    model, unfused, _ = both(make(libraries))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0]) is not Encoder
        assert_same(other, unfused, X)


def test_a_fused_model_compiles() -> None:
    model, _, _ = both(Encoder(8, 0.3))
    torch.manual_seed(1)
    expected = model(X)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(X), expected)


def test_selection(libraries: dict[str, Any]) -> None:
    def fused(**options: Any) -> set[str]:
        return set(both(make(libraries), **options)[2])

    assert fused(exclude=nn.Dropout) == {name for name in FUSED if not name.startswith("0")}
    # Those of block 2 were fastreg's before.
    assert fused(include="0.*") == {"0.dropout", "0.mlp.4"}
    assert fused(exclude=["1", "3", nn.GELU]) == {name for name in FUSED if name[0] in "02"}


def test_an_excluded_dropout_does_not_keep_the_norms_of_its_sequence_from_being_fused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5))
    assert both(model, exclude=nn.Dropout)[2] == {"0": "norm + relu"}


def test_a_sequence_that_ends_in_a_dropout_is_only_taken_where_that_is_of_use() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5))
    assert both(nn.Sequential(model))[2] == {}
    assert type(model) is nn.Sequential


# --- what is decided in each call -------------------------------------------------------------------------


def test_a_call_that_drops_nothing_runs_what_the_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = both(Encoder(8, 0.3))
    outputs = count_calls(monkeypatch, fastreg.nn.Dropout)
    model(X)
    assert len(outputs) == 2
    assert NotImplemented not in map(id, outputs)
    del outputs[:]
    model.eval()(X)
    assert all(output is NotImplemented for output in outputs)
    model.train()
    model.dropout.p = 0.0
    model.mlp[4].p = 1.0
    del outputs[:]
    found = model(X)
    assert [output is NotImplemented for output in outputs] == [True, False]
    expected = X + model.mix(model.ln_1(X))
    assert torch.equal(found, expected)


def test_an_inplace_dropout_is_not_fused_and_may_become_inplace_later() -> None:
    class Reads(nn.Module):
        """The dropout's input is read after it."""

        def __init__(self) -> None:
            super().__init__()
            self.lift, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.lift(x)
            return (self.dropout(y) + x) * y

    model, unfused, fused = both(Reads())
    assert fused == {"dropout": "dropout + add"}
    assert_same(model, unfused, X)
    for each in (model, unfused):
        each.train().dropout.inplace = True
    with torch.no_grad():
        found = []
        for each in (model, unfused):
            torch.manual_seed(1)
            found.append(each(X))
    assert torch.equal(*found)
    inplace = Reads()
    inplace.dropout.inplace = True
    assert both(inplace)[2] == {}


def test_a_hook_that_comes_later_sees_what_it_would_have_seen() -> None:
    model, unfused, _ = both(Encoder(8, 0.3))
    seen: list[torch.Tensor] = []
    for each in (model, unfused):
        each.dropout.register_forward_hook(lambda _, inputs, output: seen.append(output.detach().clone()))
    assert_same(model, unfused, X)
    assert len(seen) == 4
    torch.testing.assert_close(seen[0], seen[1])


def test_a_layer_that_takes_the_place_of_another_is_the_one_that_runs() -> None:
    model, unfused, _ = both(Encoder(8, 0.3))
    for each in (model, unfused):
        each.mlp[4] = nn.Tanh()
    assert_same(model, unfused, X)
    sequence = nn.Sequential(nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)), nn.ReLU())
    model, unfused, fused = both(sequence)
    assert fused == {"0.1": "norm + relu"}
    for each in (model, unfused):
        each[0][1] = fastreg.nn.Dropout(0.5)
    assert_same(model, unfused, X)


# --- forms ------------------------------------------------------------------------------------------------


class Form(nn.Module):
    """Dropouts and a norm, and a forward that is a function of the test's."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Dropout(0.5), nn.Dropout(0.3), nn.BatchNorm1d(5)
        self.wide, self.act, self.nothing = nn.Dropout1d(0.5), nn.ReLU(), nn.Identity()
        self.lift = nn.Linear(8, 8)
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(self, *inputs)


class Single(Form):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.function(self, x)


class Double(Form):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.function(self, x, y)


def _activation_stays_outside(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(m.lift(x)) + x)


def _residual_first(m: Form, x: torch.Tensor) -> torch.Tensor:
    return torch.add(x, m.nothing(m.a(x.sigmoid())))


def _two_dropouts(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.a(m.lift(x)) + m.b(x.sigmoid())


def _both_in_turn(m: Form, x: torch.Tensor) -> torch.Tensor:
    x = x + m.a(m.lift(x))
    return x + m.b(m.lift(x))


def _norm_before(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.a(m.norm(x)) + x


def _norm_beside(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.norm(x) + m.a(m.lift(x)))


def _norm_behind(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.norm(x + m.a(m.lift(x))))


def _into_the_residual(m: Form, x: torch.Tensor) -> torch.Tensor:
    y = m.lift(x)
    y += m.a(x)
    return y


def _in_place(m: Form, x: torch.Tensor) -> torch.Tensor:
    y = m.a(m.lift(x))
    y += x
    return y


def _into_its_input(m: Form, x: torch.Tensor) -> torch.Tensor:
    y = m.lift(x)
    # Where nothing is dropped, z is y.
    z = m.a(y)
    z += x
    return z + 2 * y


def _used_again(m: Form, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x.sigmoid())
    return (y + x) * y


def _itself(m: Form, x: torch.Tensor) -> torch.Tensor:
    return x + m.a(x)


def _broadcast(m: Form, x: torch.Tensor) -> torch.Tensor:
    return x.mean(0) + m.a(x.sigmoid())


def _whole_channels(m: Form, x: torch.Tensor) -> torch.Tensor:
    return x + m.wide(m.lift(x))


def _activation_only(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(x))


def _number(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.a(x) + 1


def _other_layout(m: Form, x: torch.Tensor) -> torch.Tensor:
    y = x.transpose(1, 2)
    return m.a(y) + y.contiguous()


FORMS: list[tuple[Callable[..., torch.Tensor], dict[str, str]]] = [
    (_activation_stays_outside, {"a": "dropout + add"}),
    (_residual_first, {"a": "dropout + add"}),
    (_two_dropouts, {"b": "dropout + add"}),
    (_both_in_turn, {"a": "dropout + add", "b": "dropout + add"}),
    (_norm_before, {"a": "dropout + add"}),
    (_norm_beside, {"norm": "norm + add + relu"}),
    (_norm_behind, {"norm": "norm + relu", "a": "dropout + add"}),
    (_into_the_residual, {}),
    (_in_place, {"a": "dropout + add"}),
    (_into_its_input, {"a": "dropout + add"}),
    (_used_again, {}),
    (_itself, {"a": "dropout + add"}),
    (_broadcast, {"a": "dropout + add"}),
    (_whole_channels, {}),
    (_activation_only, {}),
    (_number, {}),
    (_other_layout, {"a": "dropout + add"}),
]


@pytest.mark.parametrize(("function", "expected"), FORMS, ids=lambda each: getattr(each, "__name__", ""))
def test_forms(function: Callable[..., torch.Tensor], expected: dict[str, str]) -> None:
    model, unfused, fused = both(Single(function))
    assert fused == expected
    assert_same(model, unfused, X)


def test_a_norm_in_front_of_a_fused_dropout_has_its_reason() -> None:
    (item,) = fastreg.convert(Single(_norm_before), fuse=True).alone
    assert (item.name, item.reason.startswith("followed by Dropout,")) == ("norm", True)


def _added(m: Form, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y + m.a(x)


def _added_in_place(m: Form, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = m.a(x)
    z += y
    return z


@pytest.mark.parametrize(
    ("dtypes", "calls"),
    [
        ((torch.bfloat16, torch.float32), [True, False]),
        ((torch.float32, torch.bfloat16), [True, True]),
        ((torch.bfloat16, torch.float16), [True, False]),
        ((torch.float64, torch.float64), [True, True]),
        ((torch.float32, torch.float64), [False, False]),
        ((torch.float64, torch.float32), [False, False]),
        ((torch.float32, torch.int64), [False, False]),
    ],
    ids=str,
)
def test_dtypes_are_those_of_the_model(
    dtypes: tuple[torch.dtype, torch.dtype], calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = X.to(dtypes[0]), (X.flip(0) * 8).to(dtypes[1])
    asked = count_calls(monkeypatch, fastreg.nn.Dropout)
    for function, called in zip((_added, _added_in_place), calls, strict=True):
        model, unfused, fused = both(Double(function))
        assert fused == {"a": "dropout + add"}
        del asked[:]
        results = []
        for each in (model, unfused):
            torch.manual_seed(1)
            results.append(each(x, y))
        torch.testing.assert_close(*results, rtol=0.02 if torch.bfloat16 in dtypes else 1e-6, atol=0.02)
        assert len(asked) == called


def test_rates_in_tensors(libraries: dict[str, Any]) -> None:
    model, unfused, _ = both(make(libraries))
    for each in (model, unfused):
        schedule = fastreg.nn.LinearSchedule(each, 0.0, 0.8, steps=2)
        schedule.step()
    assert_same(model, unfused, X)
    assert type(model[0]) is not Encoder


def test_torchs_own_functions_see_the_model_as_it_was() -> None:
    model, unfused, _ = both(Encoder(8, 0.3))
    torch.testing.assert_close(torch.func.functional_call(model.eval(), {}, (X,)), unfused.eval()(X))
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), unfused(X))
