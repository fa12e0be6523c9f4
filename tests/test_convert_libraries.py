"""convert on the layers and models of torchvision and timm, where these are installed; elsewhere stand-ins have to do.

pip install timm torchvision        with the torch that they ask for; then
pytest tests/test_convert_libraries.py --backend native
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn

import fastreg
from fastreg.nn import external


def _missing() -> str | None:
    for name in ("torchvision", "timm"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return str(error)
    return None


_MISSING = _missing()
pytestmark = [
    pytest.mark.only(backend=("reference", "native"), device="cpu"),
    pytest.mark.skipif(
        _MISSING is not None, reason=f"torchvision and timm are tested where they are: {_MISSING}"
    ),
]

# A model -> how many layers convert replaces, and what it merges.
MODELS: dict[str, tuple[int, dict[str, int]]] = {
    "torchvision/resnet18": (20, {"norm + relu": 9, "norm + add + relu": 8}),
    "torchvision/mobilenet_v2": (52, {"norm + add": 10}),
    "torchvision/mobilenet_v3_small": (34, {"norm + relu": 5, "norm + hardswish": 18, "norm + add": 6}),
    "torchvision/efficientnet_b0": (49, {"norm + silu": 33}),
    "torchvision/regnet_y_400mf": (53, {"norm + relu": 33, "norm + add + relu": 16}),
    "torchvision/shufflenet_v2_x0_5": (56, {"norm + relu": 37}),
    "torchvision/convnext_tiny": (23, {}),
    "timm/resnet50": (53, {"norm + relu": 33, "norm + add + relu": 16}),
    "timm/efficientnet_b0": (49, {"norm + add": 9}),
    "timm/mobilenetv3_small_100": (34, {"norm + add": 6}),
    "timm/densenet121": (121, {}),
    "timm/dla34": (37, {"norm + relu": 15, "norm + add + relu": 12}),
    "timm/convnextv2_atto": (17, {}),
    "timm/vit_tiny_patch16_224": (25, {}),
    "timm/resnet50_gn": (53, {"norm + relu": 33}),
    "timm/resnetv2_50": (49, {}),
}


def _with_random_vectors(module: nn.Module) -> nn.Module:
    """Weights of one, biases and means of zero hide mistakes."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.dim() == 1:
            positive = name.endswith(("weight", "running_var"))
            tensor.data.uniform_(0.5, 1.5) if positive else tensor.data.normal_(0.0, 0.1)
    return module.double()


def _model(path: str) -> nn.Module:
    library, _, name = path.partition("/")
    torch.manual_seed(0)
    if library == "torchvision":
        return _with_random_vectors(
            importlib.import_module("torchvision.models").get_model(name, num_classes=7)
        )
    options = {"img_size": 64} if name.startswith("vit") else {}
    return _with_random_vectors(importlib.import_module("timm").create_model(name, num_classes=7, **options))


def _results(module: nn.Module, input: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Output, gradients, and what a step leaves in the buffers."""
    module.zero_grad()
    # Dropout's and stochastic depth's.
    torch.manual_seed(1)
    input = input.clone().requires_grad_()
    output = module(input)
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output, "input": input.grad, **gradients, **dict(module.named_buffers())}


def _assert_the_same(module: nn.Module, plain: nn.Module, input: torch.Tensor) -> None:
    for training in (True, False):
        found, expected = (_results(each.train(training), input) for each in (module, plain))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("path", MODELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_converted_model_computes_what_it_did(path: str, layout: torch.memory_format) -> None:
    model: Any = _model(path).to(memory_format=layout)
    plain, kinds = copy.deepcopy(model), [type(module) for module in model.modules()]
    report = fastreg.convert(model, fuse=True)
    merged = [item.what for item in report.fused]
    assert (len(report.replaced), {what: merged.count(what) for what in merged}) == MODELS[path]
    assert report.kept == []
    input = torch.randn(4, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=layout)
    _assert_the_same(model, plain, input)
    fastreg.revert(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("name", external._LAYERS)
def test_every_layer_is_the_librarys_own(name: str) -> None:
    path = external._LAYERS[name][0]
    module, _, kind = path.rpartition(".")
    # timm's group norms have 32 groups unless told.
    channels = 64 if "GroupNorm" in name else 6
    layer = _with_random_vectors(getattr(importlib.import_module(module), kind)(channels))
    plain = copy.deepcopy(layer)
    (item,) = fastreg.convert(layer).replaced
    assert (item.before, item.after) == (path, f"fastreg.nn.{name}")
    shape = (3, 5, channels) if name in ("TimmLayerNorm", "TimmRmsNorm") else (3, channels, 5, 4)
    _assert_the_same(layer, plain, torch.randn(shape, dtype=torch.float64))
