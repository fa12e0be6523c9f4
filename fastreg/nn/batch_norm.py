"""Batch normalisation as modules: torch's three, and the one that also adds a residual and applies an activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastreg.nn import _activation
from fastreg.ops.batch_norm import batch_norm, recomputing


def batch_norm_of(
    layer: _BatchNorm,
    input: torch.Tensor,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = _activation.DEFAULT_SLOPE,
) -> torch.Tensor:
    """The call of ``batch_norm`` that a layer of torch's ``_BatchNorm`` family stands for; raises its counter."""
    layer._check_input_dim(input)
    training, tracks = layer.training, layer.track_running_stats
    skip_recompute = bool(getattr(layer, "skip_recompute", False))
    momentum = 0.0 if layer.momentum is None else layer.momentum
    counter = layer.num_batches_tracked
    if training and tracks and counter is not None:
        if not (skip_recompute and recomputing()):
            counter.add_(1)
        if layer.momentum is None:
            # The cumulative average.
            momentum = 1.0 / float(counter)
    running_mean, running_var = layer.running_mean, layer.running_var
    used = not training or tracks
    return batch_norm(
        input,
        running_mean if used else None,
        running_var if used else None,
        layer.weight,
        layer.bias,
        training or (running_mean is None and running_var is None),
        momentum,
        layer.eps,
        residual=residual,
        activation=activation,
        negative_slope=negative_slope,
        skip_recompute=skip_recompute,
        skip_nonfinite=bool(getattr(layer, "skip_nonfinite", False)),
    )


class _Layer:
    """What fastreg's batch norms have that torch's have not."""

    skip_recompute: bool = False
    skip_nonfinite: bool = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return batch_norm_of(self, input)  # type: ignore[arg-type]


class BatchNorm1d(_Layer, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` with fastreg's kernels: same arguments, same parameters, same state dict.

    Equivalent to ``torch.nn.BatchNorm1d(num_features, eps, momentum, affine, track_running_stats)``; the formula, the
    dtypes and what is raised are those of ``fastreg.functional.batch_norm``.

    Attributes:
        skip_recompute, skip_nonfinite: False; set them on a layer for what ``batch_norm`` says of them.
    """


class BatchNorm2d(_Layer, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with fastreg's kernels: same arguments, same parameters, same state dict.

    Equivalent to ``torch.nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats)``; the formula, the
    dtypes and what is raised are those of ``fastreg.functional.batch_norm``. Keeps channels_last.

    Attributes:
        skip_recompute, skip_nonfinite: False; set them on a layer for what ``batch_norm`` says of them.
    """


class BatchNorm3d(_Layer, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` with fastreg's kernels: same arguments, same parameters, same state dict.

    Equivalent to ``torch.nn.BatchNorm3d(num_features, eps, momentum, affine, track_running_stats)``; the formula, the
    dtypes and what is raised are those of ``fastreg.functional.batch_norm``. Keeps channels_last_3d.

    Attributes:
        skip_recompute, skip_nonfinite: False; set them on a layer for what ``batch_norm`` says of them.
    """


class BatchNormAct2d(BatchNorm2d):
    """Batch normalisation, a residual and an activation in one kernel; timm's argument names.

    Equivalent to ``act_layer(**act_kwargs)(torch.nn.BatchNorm2d(num_features, eps, momentum, affine,
    track_running_stats)(x) + residual)``; parameters and state dict are those of ``torch.nn.BatchNorm2d``.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` makes a plain layer of any subclass of torch's and so drops the
    activation; ``fastreg.nn.SyncBatchNorm.convert_sync_batchnorm`` keeps it.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as in ``torch.nn.BatchNorm2d``.
        apply_act: False leaves the activation out.
        act_layer: torch.nn.ReLU, LeakyReLU, SiLU, GELU, Hardswish or Identity, a name that ``batch_norm`` knows, or
            None.
        act_kwargs: its arguments, such as ``{"negative_slope": 0.1}``.
        inplace: accepted as in timm; there is no tensor between norm and activation that could be overwritten.
        drop_layer: makes a module that is applied between norm and activation, which then run one after the other; it
            does not go with a residual.
        device, dtype: of the parameters and buffers.

    Attributes:
        activation, negative_slope: what act_layer and act_kwargs came to.
        drop: what drop_layer made, or None.
        skip_recompute, skip_nonfinite: False; set them on a layer for what ``batch_norm`` says of them.

    Raises:
        ValueError: an activation that the norms do not fuse; a residual given to a layer with a drop_layer.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: _activation.ActivationLayer = torch.nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], torch.nn.Module] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation, self.negative_slope = _activation.resolve(
            "BatchNormAct2d", act_layer if apply_act else None, act_kwargs
        )
        self.drop = None if drop_layer is None else drop_layer()

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self.drop is None:
            return batch_norm_of(self, input, residual, self.activation, self.negative_slope)
        if residual is not None:
            raise ValueError(
                "BatchNormAct2d: a drop_layer stands between norm and activation, where the residual is added; "
                "use either of them"
            )
        argument = self.drop(batch_norm_of(self, input))
        return _activation.apply(argument, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_activation.described(self.activation, self.negative_slope)}"
