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

from fastreg.nn import _fused
from fastreg.nn._activation import DEFAULT_SLOPE, activation_of
from fastreg.nn.batch_norm import batch_norm_of
from fastreg.nn.group_norm import group_norm_of
from fastreg.nn.sync_batch_norm import sync_batch_norm_of
from fastreg.ops.batch_norm import batch_norm
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


def _batch_norm_act(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _with_activation(self, x, batch_norm_of)


def _sync_batch_norm_act(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _with_activation(self, x, sync_batch_norm_of)


def _group_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return group_norm_of(self, x)  # type: ignore[no-any-return]


def _group_norm_act(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _with_activation(self, x, group_norm_of)


def _with_activation(layer: Any, x: torch.Tensor, norm: Callable[..., torch.Tensor]) -> torch.Tensor:
    """timm's norm + dropout + activation, in one kernel where there is no dropout and the activation is known."""
    drop, act = getattr(layer, "drop", None), getattr(layer, "act", None)
    found = None
    if _is_nothing(drop) and act is not None and not _fused.observed(act):
        found = activation_of(act)
    if found is not None:
        return norm(layer, x, None, *found)
    output = norm(layer, x)
    for following in (drop, act):
        output = output if following is None else following(output)
    return output


def _is_only_a_norm(layer: Any) -> bool:
    return _is_nothing(getattr(layer, "drop", None)) and _is_nothing(getattr(layer, "act", None))


def _is_nothing(module: torch.nn.Module | None) -> bool:
    return module is None or (type(module) is torch.nn.Identity and not _fused.observed(module))


def _frozen_batch_norm(
    layer: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = DEFAULT_SLOPE,
) -> Any:
    if x.dim() != 4 or x.dtype != layer.weight.dtype:
        # torchvision's formula takes any number of dimensions, and promotes.
        return NotImplemented
    return batch_norm(
        *(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps),
        residual=residual,
        activation=activation,
        negative_slope=negative_slope,
    )


def _frozen_batch_norm_2d(self: Any, x: torch.Tensor) -> torch.Tensor:
    output = _frozen_batch_norm(self, x)
    if output is NotImplemented:
        base: Any = type(self).__base__
        return base.forward(self, x)  # type: ignore[no-any-return]
    return output  # type: ignore[no-any-return]


# How the layers below are fused with what follows.
_FUSIONS: dict[str, _fused.Fusion] = {
    "TorchvisionFrozenBatchNorm2d": _fused.Fusion(_frozen_batch_norm),
    "TimmBatchNormAct2d": _fused.Fusion(batch_norm_of, _is_only_a_norm),
    "TimmSyncBatchNormAct": _fused.Fusion(sync_batch_norm_of, _is_only_a_norm),
    **dict.fromkeys(("TimmGroupNorm", "TimmGroupNorm1"), _fused.Fusion(group_norm_of, adds=False)),
    **dict.fromkeys(
        ("TimmGroupNormAct", "TimmGroupNorm1Act"),
        _fused.Fusion(group_norm_of, _is_only_a_norm, adds=False),
    ),
}

# Name here -> (the library's class, the forward that replaces its own).
_LAYERS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "TorchvisionLayerNorm2d": ("torchvision.models.convnext.LayerNorm2d", _layer_norm_2d),
    "TimmLayerNorm": ("timm.layers.norm.LayerNorm", _layer_norm),
    "TimmLayerNorm2d": ("timm.layers.norm.LayerNorm2d", _layer_norm_2d),
    "TimmRmsNorm": ("timm.layers.norm.RmsNorm", _rms_norm),
    "TimmRmsNorm2d": ("timm.layers.norm.RmsNorm2d", _rms_norm_2d),
    "TorchvisionFrozenBatchNorm2d": ("torchvision.ops.misc.FrozenBatchNorm2d", _frozen_batch_norm_2d),
    "TimmBatchNormAct2d": ("timm.layers.norm_act.BatchNormAct2d", _batch_norm_act),
    "TimmSyncBatchNormAct": ("timm.layers.norm_act.SyncBatchNormAct", _sync_batch_norm_act),
    "TimmGroupNorm": ("timm.layers.norm.GroupNorm", _group_norm),
    "TimmGroupNorm1": ("timm.layers.norm.GroupNorm1", _group_norm),
    "TimmGroupNormAct": ("timm.layers.norm_act.GroupNormAct", _group_norm_act),
    "TimmGroupNorm1Act": ("timm.layers.norm_act.GroupNorm1Act", _group_norm_act),
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
    if name in _FUSIONS:
        _fused.register(layer, _FUSIONS[name])
    return layer
