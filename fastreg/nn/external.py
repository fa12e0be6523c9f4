"""Layers of torchvision and timm with fastreg's kernels inside.

Neither library is a dependency, so these classes are made on first use: ``fastreg.nn.external.<name>`` imports the
library's own class and derives one from it whose ``forward`` calls fastreg. Being attributes of this module, the
classes pickle; being subclasses, ``isinstance`` and state dicts keep working.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from fastreg.ops.layer_norm import layer_norm
from fastreg.ops.rms_norm import rms_norm


def _layer_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def _layer_norm_2d(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _layer_norm(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _rms_norm_2d(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _rms_norm(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# Name here -> (the library's class, the forward that replaces its own).
_LAYERS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "TorchvisionLayerNorm2d": ("torchvision.models.convnext.LayerNorm2d", _layer_norm_2d),
    "TimmLayerNorm": ("timm.layers.norm.LayerNorm", _layer_norm),
    "TimmLayerNorm2d": ("timm.layers.norm.LayerNorm2d", _layer_norm_2d),
    "TimmRmsNorm": ("timm.layers.norm.RmsNorm", _rms_norm),
    "TimmRmsNorm2d": ("timm.layers.norm.RmsNorm2d", _rms_norm_2d),
}
_NAMES = {path: name for name, (path, _) in _LAYERS.items()}


def replacement(layer: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    """The class that takes the place of ``layer``, or None where this module knows none."""
    name = _NAMES.get(f"{layer.__module__}.{layer.__qualname__}")
    return None if name is None else getattr(importlib.import_module(__name__), name)


def __getattr__(name: str) -> Any:
    if name not in _LAYERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path, forward = _LAYERS[name]
    module, _, attribute = path.rpartition(".")
    base = getattr(importlib.import_module(module), attribute)
    documentation = f"``{path}`` with fastreg's kernels."
    layer = type(name, (base,), {"__module__": __name__, "__doc__": documentation, "forward": forward})
    globals()[name] = layer
    return layer
