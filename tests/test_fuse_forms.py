"""convert(fuse=True): what is merged into one kernel, and what is not and why."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastreg
from fuse_examples import X, assert_same, fused_names, make, randomise, reasons

pytestmark = pytest.mark.backend_independent


# --- patterns ---------------------------------------------------------------------------------------------


class Form(nn.Module):
    """Two norms, an activation, and a forward that is a function of the test's."""

    def __init__(self, function: Callable[..., torch.Tensor], activation: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act = activation or nn.ReLU()
        self.inplace, self.drop, self.lift = (
            nn.ReLU(inplace=True),
            nn.Dropout(0.0),
            nn.Conv2d(4, 4, 1, bias=False),
        )
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def _method_add(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.a(x).add(x.sigmoid()).relu_()


def _both_norms(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(x) + m.b(x.sigmoid()))


def _norm_of_norm(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.b(m.act(m.a(x))) + x)


def _twice(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(m.act(m.a(x))))


def _used_again(m: Form, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    return m.act(y) + y


def _into_the_other(m: Form, x: torch.Tensor) -> torch.Tensor:
    y = m.lift(x)
    y += m.a(x)
    return m.act(y)


def _scaled_addition(m: Form, x: torch.Tensor) -> torch.Tensor:
    return torch.add(m.a(x), x, alpha=2)


def _interleaved(m: Form, x: torch.Tensor) -> torch.Tensor:
    first = m.a(m.lift(x))
    second = m.act(m.b(m.lift(x.sigmoid())) + x)
    return m.act(first + second)


def _changed_in_between(m: Form, x: torch.Tensor) -> torch.Tensor:
    y = m.drop(m.lift(x))
    norm = m.a(y)
    z = m.inplace(y)
    return m.act(norm + z.sigmoid())


def _same_norm_in_between(m: Form, x: torch.Tensor) -> torch.Tensor:
    first = m.a(m.lift(x))
    return m.act(first + torch.sigmoid(m.a(x)))


def _broadcast(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(x) + x.mean((2, 3), keepdim=True))


def _wider(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(x) + x.double())


def _wider_in_place(m: Form, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    y += x.double()
    return m.act(y)


def _number(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(x) + 1)


def _itself(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(x) + x)


FORMS: list[tuple[Callable[..., torch.Tensor], dict[str, str]]] = [
    (_method_add, {"a": "norm + add + relu"}),
    (_both_norms, {"b": "norm + add + relu"}),
    (_norm_of_norm, {"a": "norm + relu", "b": "norm + add + relu"}),
    (_twice, {"a": "norm + relu"}),
    (_used_again, {}),
    (_into_the_other, {}),
    (_scaled_addition, {}),
    (_interleaved, {"a": "norm + add + relu", "b": "norm + add + relu"}),
    (_same_norm_in_between, {}),
    (_broadcast, {"a": "norm + add + relu"}),
    (_wider, {"a": "norm + add + relu"}),
    (_wider_in_place, {"a": "norm + add + relu"}),
    (_number, {}),
    (_itself, {"a": "norm + add + relu"}),
]


@pytest.mark.parametrize(("function", "expected"), FORMS, ids=lambda each: getattr(each, "__name__", ""))
def test_forms(function: Callable[..., torch.Tensor], expected: dict[str, str]) -> None:
    model, plain = randomise(Form(function)), randomise(Form(function))
    plain.load_state_dict(model.state_dict())
    assert fused_names(model) == expected
    assert_same(model, plain, torch.randn(3, 4, 5, 5))


def test_a_norm_is_not_moved_past_a_write_into_its_input() -> None:
    model = randomise(Form(_changed_in_between))
    plain = copy.deepcopy(model)
    assert "may change" in reasons(model)["a"]
    with torch.no_grad():
        torch.testing.assert_close(
            model(X[:, :1].expand(-1, 4, -1, -1)), plain(X[:, :1].expand(-1, 4, -1, -1))
        )


def test_stand_ins_do_not_stay_in_the_model() -> None:
    def keeps(m: Form, x: torch.Tensor) -> torch.Tensor:
        m.last = m.a(x)
        m.b.last = m.last
        return m.act(m.last)

    model = Form(keeps)
    assert "sets an attribute" in reasons(model)["a"]
    assert not hasattr(model, "last")
    assert not hasattr(model.b, "last")


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.LeakyReLU(0.3, inplace=True), "leaky_relu"),
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.Hardswish(), "hardswish"),
        (nn.Mish(), None),
        (nn.ReLU6(), None),
    ],
    ids=str,
)
def test_activations(activation: nn.Module, name: str | None) -> None:
    model = randomise(Form(_both_norms, activation))
    plain = copy.deepcopy(model)
    assert fused_names(model) == {"b": f"norm + add + {name}" if name else "norm + add"}
    assert_same(model, plain, torch.randn(3, 4, 5, 5))
    alone = nn.Sequential(nn.BatchNorm2d(4), activation)
    assert (fused_names(alone) == {"0": f"norm + {name}"}) == (name is not None)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_every_batch_norm(dimensions: int) -> None:
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    model = randomise(nn.Sequential(norm(4), nn.ReLU()))
    plain = copy.deepcopy(model)
    assert fused_names(model) == {"0": "norm + relu"}
    assert_same(model, plain, torch.randn(3, 4, *(5,) * dimensions))


# --- forwards that a graph does not show ------------------------------------------------------------------


def _with_block(m: Form, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = m.a(x)
    return m.act(y)


def _sets(m: Form, x: torch.Tensor) -> torch.Tensor:
    m.seen = 1
    return m.act(m.a(x))


def _branches_on_values(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(x)) if x.sum() > 0 else x


def _asks_for_a_type(m: Form, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    return m.act(y) if isinstance(y, torch.Tensor) else y


def _draws(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(x)) * random.choice((1, 2))


def _draws_a_tensor(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(x)) if torch.rand(()) > 2 else m.act(m.a(x)) + 0


def _asks_for_the_mode(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(x)) if torch.is_grad_enabled() else m.a(x)


@torch.no_grad()
def _decorated(m: Form, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.a(x))


def _tries(m: Form, x: torch.Tensor) -> torch.Tensor:
    try:
        return m.act(m.a(x)) if x.sum() > 0 else m.act(x)
    except TypeError:
        return x


def _checkpoints(m: Form, x: torch.Tensor) -> torch.Tensor:
    return torch.utils.checkpoint.checkpoint(lambda x: m.act(m.a(x)), x, use_reentrant=False)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_with_block, "_with_block has a with block"),
        (_sets, "_sets sets an attribute"),
        (_branches_on_values, "torch.fx cannot trace it"),
        (_asks_for_a_type, "asks for the type of a value"),
        (_draws, "calls"),
        (_draws_a_tensor, "does not come from its input"),
        (_asks_for_the_mode, "calls is_grad_enabled"),
        (_decorated, "_contextlib.py, which leaves no trace"),
        (_tries, "_tries has a try block"),
        (_checkpoints, ""),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_a_graph_does_not_show_is_left_alone(function: Any, reason: str) -> None:
    model = Form(function)
    before = sorted(vars(model))
    text = reasons(model)["a"]
    assert text.startswith("Form: ")
    assert reason in text
    assert type(model) is Form
    fastreg.revert(model)
    assert sorted(vars(model)) == before


def test_the_type_of_an_input_is_a_tensors() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.BatchNorm1d(4), nn.ReLU()

        def forward(self, x: Any) -> torch.Tensor:
            x = torch.cat([x] if isinstance(x, torch.Tensor) else x, 1)
            return self.act(self.norm(x))

    model, plain = Either(), Either()
    assert fused_names(model) == {"norm": "norm + relu"}
    x = torch.randn(5, 4)
    torch.testing.assert_close(model(x), plain(x))
    parts = [x[:, :1], x[:, 1:]]
    torch.testing.assert_close(model(parts), plain(parts))


def test_optional_arguments_are_left_out() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            x = self.norm(x)
            return F.relu(x if residual is None else x + residual)

    model, plain = Optional(), Optional()
    assert fused_names(model) == {"norm": "norm + relu"}
    x = torch.randn(5, 4)
    assert_same(model, plain, x)
    torch.testing.assert_close(model(x, x), plain(x, x))


def test_other_reasons() -> None:
    hooked, patched = Form(_both_norms), Form(_both_norms)
    hooked.b.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    lonely = nn.ModuleDict({"norm": nn.BatchNorm2d(4)})
    model = nn.ModuleDict({"hooked": hooked, "patched": patched, "graph": graph, "lonely": lonely})
    found = reasons(model)
    assert "hooks" in found["hooked.b"]
    assert "replaced on the instance" in found["patched.a"]
    assert "GraphModule" in found["graph.0"]
    assert found["lonely.norm"] == "no forward that was looked at calls it"
    assert fused_names(hooked) == {}


def test_modes_and_profiles_are_left_as_they_were() -> None:
    import sys

    model = make().eval()
    model.layer1.train()
    modes = [module.training for module in model.modules()]
    assert sys.getprofile() is None
    fastreg.convert(model, fuse=True)
    assert [module.training for module in model.modules()] == modes
    assert sys.getprofile() is None


class Finalized:
    """An object whose finalizer does what no graph shows."""

    ended = 0

    def __del__(self) -> None:
        try:
            type(self).ended += 1
        finally:
            pass


def test_what_the_garbage_collector_runs_meanwhile_is_not_taken_for_the_forward() -> None:
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.activation = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2000):
                cycle: list[object] = [Finalized()]
                cycle.append(cycle)
            return self.activation(self.norm(x))

    before, collects = Finalized.ended, gc.isenabled()
    gc.enable()
    try:
        report = fastreg.convert(Wasteful(), fuse=True)
        assert gc.isenabled()
        gc.collect()
    finally:
        if not collects:
            gc.disable()
    # Once in each mode.
    assert Finalized.ended - before == 4000
    assert {item.name: item.what for item in report.fused} == {"norm": "norm + relu"}
