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
from fastreg.nn._rate import Rated
from fastreg.nn.batch_norm import batch_norm_of
from fastreg.nn.group_norm import group_norm_of
from fastreg.nn.sync_batch_norm import sync_batch_norm_of
from fastreg.ops.batch_norm import batch_norm
from fastreg.ops.drop_block import drop_block2d, drop_block3d
from fastreg.ops.dropout import drop_path
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


def _frozen_batch_norm_2d(self: Any, x: torch.Tensor) -> Any:
    output = _frozen_batch_norm(self, x)
    return _its_own_forward(self, x) if output is NotImplemented else output


def _its_own_forward(layer: Any, x: torch.Tensor) -> Any:
    return layer._librarys_class.forward(layer, x)


def _torchvision_drop_block_2d(self: Any, input: torch.Tensor) -> torch.Tensor:
    return drop_block2d(input, self.p, self.block_size, self.inplace, self.training)


def _torchvision_drop_block_3d(self: Any, input: torch.Tensor) -> torch.Tensor:
    return drop_block3d(input, self.p, self.block_size, self.inplace, self.training)


def _timm_drop_block_2d(self: Any, x: torch.Tensor) -> Any:
    if not self.training:
        return x
    p = self.gamma_scale * self.drop_prob
    if self.with_noise or (not isinstance(p, torch.Tensor) and p > 1.0):
        return _its_own_forward(self, x)
    return drop_block2d(
        # One for each dimension: timm cuts a block that is too large in that dimension alone.
        *(x, p, (self.block_size, self.block_size), self.inplace),
        seeds="anywhere",
        shared=self.couple_channels,
        rescale="batch" if self.scale_by_keep else None,
    )


def _shown_rate(self: Any) -> str:
    # timm's own rounds it, which a tensor does not allow.
    return f"{self._rate_name}={self._rate()}"


def _stochastic_depth(self: Any, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    return drop_path(input, self.p, self.training, mode=self.mode, residual=residual)


def _timm_drop_path(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    return drop_path(*(x, self.drop_prob, self.training), scale_by_keep=self.scale_by_keep, residual=residual)


# How the layers below are fused with what follows, and the norms of rows with what is before them.
_FUSIONS: dict[str, _fused.Fusion | _fused.NormKernel] = {
    "TorchvisionFrozenBatchNorm2d": _fused.Fusion(_frozen_batch_norm),
    "TimmBatchNormAct2d": _fused.Fusion(batch_norm_of, _is_only_a_norm),
    "TimmSyncBatchNormAct": _fused.Fusion(sync_batch_norm_of, _is_only_a_norm),
    **dict.fromkeys(("TimmGroupNorm", "TimmGroupNorm1"), _fused.Fusion(group_norm_of, adds=False)),
    **dict.fromkeys(
        ("TimmGroupNormAct", "TimmGroupNorm1Act"),
        _fused.Fusion(group_norm_of, _is_only_a_norm, adds=False),
    ),
    "TorchvisionStochasticDepth": _fused.with_addition(_stochastic_depth, "drop path"),
    "TimmDropPath": _fused.with_addition(_timm_drop_path, "drop path"),
    "TimmLayerNorm": _fused.layer_norm_of_sum,
    "TimmRmsNorm": _fused.rms_norm_of_sum,
}

# The layers below that are of the dropout family -> what their libraries call the rate.
_RATES = {
    "TorchvisionDropBlock2d": "p",
    "TorchvisionDropBlock3d": "p",
    "TorchvisionStochasticDepth": "p",
    "TimmDropPath": "drop_prob",
    "TimmDropBlock2d": "drop_prob",
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
    "TorchvisionDropBlock2d": ("torchvision.ops.drop_block.DropBlock2d", _torchvision_drop_block_2d),
    "TorchvisionDropBlock3d": ("torchvision.ops.drop_block.DropBlock3d", _torchvision_drop_block_3d),
    "TorchvisionStochasticDepth": ("torchvision.ops.stochastic_depth.StochasticDepth", _stochastic_depth),
    "TimmDropPath": ("timm.layers.drop.DropPath", _timm_drop_path),
    "TimmDropBlock2d": ("timm.layers.drop.DropBlock2d", _timm_drop_block_2d),
}
_NAMES = {path: name for name, (path, _) in _LAYERS.items()}


def is_known(layer: type) -> bool:
    """Whether a class of this module takes the place of ``layer``."""
    return f"{layer.__module__}.{layer.__qualname__}" in _NAMES


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
    members: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"``{path}`` with fastreg's kernels.",
        "forward": forward,
        "_librarys_class": base,
    }
    if name in _RATES:
        members |= {"_rate_name": _RATES[name], "extra_repr": _shown_rate}
    layer = type(name, (base, Rated) if name in _RATES else (base,), members)
    globals()[name] = layer
    if name in _FUSIONS:
        _fused.register(layer, _FUSIONS[name])
    return layer
