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
from fastreg.nn._rate import Rated


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

# A model ("dropping": with rates that are not 0) -> how many layers convert replaces, and what it merges.
MODELS: dict[str, tuple[int, dict[str, int]]] = {
    "torchvision/resnet18": (20, {"norm + relu": 9, "norm + add + relu": 8}),
    "torchvision/mobilenet_v2": (53, {"norm + add": 10}),
    "torchvision/mobilenet_v3_small": (35, {"norm + relu": 5, "norm + hardswish": 18, "norm + add": 6}),
    "torchvision/efficientnet_b0": (66, {"norm + silu": 33, "drop path + add": 9}),
    "torchvision/regnet_y_400mf": (53, {"norm + relu": 33, "norm + add + relu": 16}),
    "torchvision/shufflenet_v2_x0_5": (56, {"norm + relu": 37}),
    "torchvision/convnext_tiny": (41, {"drop path + add": 18}),
    "timm/resnet50": (53, {"norm + relu": 33, "norm + add + relu": 16}),
    "timm/resnet50 dropping": (
        77,
        {"norm + relu": 24, "norm + add + relu": 1, "drop path + add": 15},
    ),
    "timm/efficientnet_b0": (49, {"norm + add": 9}),
    "timm/efficientnet_b0 dropping": (64, {"drop path + add": 9}),
    "timm/mobilenetv3_small_100": (34, {"norm + add": 6}),
    "timm/densenet121": (122, {}),
    "timm/dla34": (38, {"norm + relu": 15, "norm + add + relu": 12}),
    "timm/convnextv2_atto": (42, {}),
    "timm/convnextv2_atto dropping": (53, {"drop path + add": 11}),
    "timm/vit_tiny_patch16_224": (75, {}),
    "timm/vit_tiny_patch16_224 dropping": (97, {"drop path + add": 11, "drop path + add + norm": 11}),
    "timm/resnet50_gn": (53, {"norm + relu": 33}),
    "timm/resnetv2_50": (50, {}),
}


def _with_random_vectors(module: nn.Module) -> nn.Module:
    """Weights of one, biases and means of zero hide mistakes."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.dim() == 1:
            positive = name.endswith(("weight", "running_var"))
            tensor.data.uniform_(0.5, 1.5) if positive else tensor.data.normal_(0.0, 0.1)
    return module.double()


def _model(path: str) -> nn.Module:
    library, _, name = path.removesuffix(" dropping").partition("/")
    torch.manual_seed(0)
    if library == "torchvision":
        return _with_random_vectors(
            importlib.import_module("torchvision.models").get_model(name, num_classes=7)
        )
    options: dict[str, Any] = {"img_size": 64} if name.startswith("vit") else {}
    if path.endswith(" dropping"):
        options |= {"drop_rate": 0.1, "drop_path_rate": 0.2}
        options |= {"drop_block_rate": 0.1} if name == "resnet50" else {}
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
    found, expected = (_results(each, input) for each in (module, plain))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def _assert_the_same_but_for_masks(module: nn.Module, plain: nn.Module, input: torch.Tensor) -> None:
    """In evaluation, and in training with the dropouts asleep, whose masks are others than the library's."""
    dropouts = [name for name, each in module.named_modules() if isinstance(each, Rated)]
    for training in (True, False):
        for each in (module, plain):
            each.train(training)
            for name in dropouts:
                each.get_submodule(name).eval()
        _assert_the_same(module, plain, input)


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
    _assert_the_same_but_for_masks(model, plain, input)
    if any(what.startswith("drop path + add") for what in merged):
        # Equal masks from the same state of the generator, fused or not.
        fastreg.convert(plain)
        _assert_the_same(model.train(), plain.train(), input)
    fastreg.revert(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("name", [name for name in external._LAYERS if name not in external._RATES])
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
    _assert_the_same_but_for_masks(layer, plain, torch.randn(shape, dtype=torch.float64))


# Name of a layer of the dropout family -> what it is made with, and how many dimensions its input has.
DROPOUTS: list[tuple[str, dict[str, Any], int]] = [
    ("TorchvisionDropBlock2d", {"p": 0.2, "block_size": 5}, 4),
    ("TorchvisionDropBlock2d", {"p": 0.3, "block_size": 99, "inplace": True}, 4),
    ("TorchvisionDropBlock3d", {"p": 0.2, "block_size": 3}, 5),
    ("TorchvisionStochasticDepth", {"p": 0.3, "mode": "row"}, 3),
    ("TimmDropPath", {"drop_prob": 0.3}, 3),
    ("TimmDropPath", {"drop_prob": 0.3, "scale_by_keep": False}, 4),
    ("TimmDropBlock2d", {"drop_prob": 0.1, "block_size": 4}, 4),
    ("TimmDropBlock2d", {"drop_prob": 0.1, "block_size": 7, "gamma_scale": 0.5}, 4),
    ("TimmDropBlock2d", {"drop_prob": 0.005, "block_size": 15, "couple_channels": False}, 4),
    ("TimmDropBlock2d", {"drop_prob": 0.1, "block_size": 2, "scale_by_keep": False, "inplace": True}, 4),
]


@pytest.mark.parametrize(("name", "options", "dimensions"), DROPOUTS, ids=str)
def test_every_dropout_drops_as_often_and_scales_as_the_librarys(
    name: str, options: dict[str, Any], dimensions: int
) -> None:
    path = external._LAYERS[name][0]
    module, _, kind = path.rpartition(".")
    layer = getattr(importlib.import_module(module), kind)(**options)
    plain = copy.deepcopy(layer)
    (item,) = fastreg.convert(layer).replaced
    assert (item.before, item.after) == (path, f"fastreg.nn.{name}")
    shape = (2000, 2, 9, 11, 9)[:dimensions]
    torch.manual_seed(0)
    outputs = [each(torch.ones(shape)) for each in (layer, plain)]
    shares = [(output == 0).float().mean(dim=0) for output in outputs]
    # Position by position: blocks are rarer at the borders. Five times the deviation of a difference of shares.
    torch.testing.assert_close(*shares, rtol=0.0, atol=5 * (0.5 / 2000) ** 0.5)
    together = [((output == 0) == (output[:, :1] == 0)).all() for output in outputs]
    assert together[0] == together[1]
    # What is kept is divided by what is left, which differs a little between two masks.
    torch.testing.assert_close(outputs[0].max(), outputs[1].max(), rtol=0.05, atol=0.0)
    assert layer.eval()(outputs[0]) is outputs[0]


@pytest.mark.parametrize("options", [{"with_noise": True}, {"gamma_scale": 11.0}], ids=str)
def test_timms_drop_block_does_itself_what_no_kernel_does(options: dict[str, Any]) -> None:
    layer = importlib.import_module("timm.layers").DropBlock2d(0.1, 3, **options)
    plain, input = copy.deepcopy(layer), torch.randn(2, 3, 30, 30)
    assert len(fastreg.convert(layer).replaced) == 1
    outputs = []
    for each in (layer, plain):
        torch.manual_seed(0)
        outputs.append(each(input))
    assert torch.equal(*outputs)
