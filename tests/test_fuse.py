"""convert(fuse=True): what is merged into one kernel, what is not and why, and that a model stays what it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastreg
from fastreg.fuse.classes import ORIGINAL
from fastreg.nn import _fused

pytestmark = pytest.mark.backend_independent


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


# --- synchronised -----------------------------------------------------------------------------------------


def test_synchronised_norms_are_fused_too() -> None:
    model, plain = make(), make()
    report = fastreg.convert(model, fuse=True, sync=True)
    assert {item.name: item.what for item in report.fused} == FUSED
    assert all(item.after == "fastreg.nn.SyncBatchNorm" for item in report.replaced)
    assert_same(model, plain, X)
    fastreg.revert(model)
    assert type(model.stem[1]) is nn.BatchNorm2d
