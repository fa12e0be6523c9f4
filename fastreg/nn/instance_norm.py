"""Instance normalisation as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.instancenorm import _InstanceNorm

from fastreg.nn import _activation
from fastreg.ops.instance_norm import instance_norm


def instance_norm_of(
    layer: _InstanceNorm,
    input: torch.Tensor,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = _activation.DEFAULT_SLOPE,
) -> Any:
    """The call of ``instance_norm`` that a layer stands for.

    NotImplemented with a residual, which it does not add, and for an input without a batch or with another number of
    channels: torch's forward reshapes the one and complains about the other.
    """
    batched = input.dim() == layer._get_no_batch_dim() + 1
    if residual is not None or not batched or input.shape[1] != layer.num_features:
        return NotImplemented
    return _normalize(layer, input, activation, negative_slope)


def _normalize(
    layer: _InstanceNorm, input: torch.Tensor, activation: str | None, negative_slope: float
) -> torch.Tensor:
    return instance_norm(
        *(input, layer.running_mean, layer.running_var, layer.weight, layer.bias),
        layer.training or not layer.track_running_stats,
        0.0 if layer.momentum is None else layer.momentum,
        layer.eps,
        activation=activation,
        negative_slope=negative_slope,
    )


class _Layer:
    """torch's forward, which checks the input and takes one without a batch, around fastreg's op."""

    def _apply_instance_norm(self, input: torch.Tensor) -> torch.Tensor:
        return _normalize(self, input, None, _activation.DEFAULT_SLOPE)  # type: ignore[arg-type]


class InstanceNorm1d(_Layer, torch.nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d`` with fastreg's kernels: same arguments, same parameters, same state dict.

    Equivalent to ``torch.nn.InstanceNorm1d(num_features, eps, momentum, affine, track_running_stats)``; the formula,
    the dtypes and what is raised are those of ``fastreg.functional.instance_norm``.
    """


class InstanceNorm2d(_Layer, torch.nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` with fastreg's kernels: same arguments, same parameters, same state dict.

    Equivalent to ``torch.nn.InstanceNorm2d(num_features, eps, momentum, affine, track_running_stats)``; the formula,
    the dtypes and what is raised are those of ``fastreg.functional.instance_norm``. Keeps channels_last, which torch's
    does not.
    """


class InstanceNorm3d(_Layer, torch.nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` with fastreg's kernels: same arguments, same parameters, same state dict.

    Equivalent to ``torch.nn.InstanceNorm3d(num_features, eps, momentum, affine, track_running_stats)``; the formula,
    the dtypes and what is raised are those of ``fastreg.functional.instance_norm``. Keeps channels_last_3d, which
    torch's does not.
    """
