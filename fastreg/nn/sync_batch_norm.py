"""Batch normalisation over all processes as modules: torch's SyncBatchNorm, and one with residual and activation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from fastreg.nn import _activation
from fastreg.nn.batch_norm import BatchNorm2d, BatchNormAct2d, batch_norm_of
from fastreg.ops.batch_norm import recomputing
from fastreg.ops.sync_batch_norm import sync_batch_norm, synchronises


def sync_batch_norm_of(
    layer: torch.nn.SyncBatchNorm,
    input: torch.Tensor,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = _activation.DEFAULT_SLOPE,
) -> torch.Tensor:
    """The call that a ``torch.nn.SyncBatchNorm`` stands for; raises its counter. Others are asked in training only."""
    layer._check_input_dim(input)
    layer._check_non_zero_input_channels(input)
    if not (layer.training and synchronises(layer.process_group)):
        return batch_norm_of(layer, input, residual, activation, negative_slope)
    skip_recompute = bool(getattr(layer, "skip_recompute", False))
    momentum = 0.0 if layer.momentum is None else layer.momentum
    counter = layer.num_batches_tracked if layer.track_running_stats else None
    if counter is not None:
        if not (skip_recompute and recomputing()):
            counter.add_(1)
        if layer.momentum is None:
            # The cumulative average: the one number that the host has to wait for, here as in torch.
            momentum = 1.0 / float(counter)
    return sync_batch_norm(
        input,
        layer.running_mean if layer.track_running_stats else None,
        layer.running_var if layer.track_running_stats else None,
        layer.weight,
        layer.bias,
        True,
        momentum,
        layer.eps,
        residual=residual,
        activation=activation,
        negative_slope=negative_slope,
        skip_recompute=skip_recompute,
        skip_nonfinite=bool(getattr(layer, "skip_nonfinite", False)),
        process_group=layer.process_group,
    )


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` with fastreg's kernels: same arguments, same parameters, same state dict.

    Equivalent to ``torch.nn.SyncBatchNorm(num_features, eps, momentum, affine, track_running_stats, process_group)``,
    and on CPU tensors, which that refuses, to ``torch.nn.BatchNorm2d`` of the batches of all processes together. What
    the processes exchange, and what they must agree on, is described at ``fastreg.ops.sync_batch_norm``: in training
    one collective forward and one backward; in evaluation, in a group of one and without ``torch.distributed``, none.

    Works in DistributedDataParallel and in FSDP2 (``fully_shard``). The constructor of the former refuses any
    ``torch.nn.SyncBatchNorm`` on the CPU; there, wrap the model first and convert ``wrapped.module`` then, which is as
    good, since conversion keeps parameters and buffers. ``momentum=None`` reads the counter of batches on the host;
    nothing else waits for a GPU.

    Attributes:
        process_group: whose processes share their statistics; None: all of them.
        skip_recompute, skip_nonfinite: False; set them on a layer for what ``batch_norm`` says of them.
    """

    process_group: Any = None
    skip_recompute: bool = False
    skip_nonfinite: bool = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return sync_batch_norm_of(self, input)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """Convert the batch norms of a model, torch's and fastreg's, to ``fastreg.nn.SyncBatchNorm``.

        As torch's method of this name: in place for the layers inside ``module``, which become new objects with the
        same parameters, buffers and mode (hooks on them are not carried over); a ``module`` that is itself a batch norm
        comes back as a new object. ``BatchNormAct2d`` becomes ``SyncBatchNormAct2d``, with its activation.
        ``fastreg.convert(model, sync=True)`` changes the layers themselves, hooks included.

        A subclass with a forward of its own, of which torch's method would make a plain layer, and a lazy layer that
        has not seen an input are left as they are, with a warning.

        Args:
            module: the model, or a batch norm.
            process_group: whose processes share their statistics; None: all of them.

        Returns:
            The model, or the new layer.
        """
        converted = module
        if isinstance(module, _BatchNorm):
            reason = _why_not(module)
            if reason is None:
                converted = _converted(module, process_group)
            else:
                warnings.warn(f"{type(module).__name__} is not synchronised: {reason}", stacklevel=2)
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted


class SyncBatchNormAct2d(SyncBatchNorm):
    """``BatchNormAct2d`` over the batches of all processes: batch norm, a residual and an activation in one kernel.

    Equivalent to ``act_layer(**act_kwargs)(fastreg.nn.SyncBatchNorm(num_features, eps, momentum, affine,
    track_running_stats, process_group)(x) + residual)``; parameters and state dict are those of
    ``torch.nn.BatchNorm2d``. ``fastreg.nn.SyncBatchNorm.convert_sync_batchnorm`` makes it of ``BatchNormAct2d``.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as in ``torch.nn.SyncBatchNorm``.
        apply_act, act_layer, act_kwargs, inplace, drop_layer: as in ``BatchNormAct2d``.
        process_group: whose processes share their statistics; None: all of them.
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
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, process_group),
            device=device,
            dtype=dtype,
        )
        self.activation, self.negative_slope = _activation.resolve(
            "SyncBatchNormAct2d", act_layer if apply_act else None, act_kwargs
        )
        self.drop = None if drop_layer is None else drop_layer()

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self.drop is None:
            return sync_batch_norm_of(self, input, residual, self.activation, self.negative_slope)
        if residual is not None:
            raise ValueError(
                "SyncBatchNormAct2d: a drop_layer stands between norm and activation, where the residual is added; "
                "use either of them"
            )
        argument = self.drop(sync_batch_norm_of(self, input))
        return _activation.apply(argument, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_activation.described(self.activation, self.negative_slope)}"


_FORWARDS = frozenset(
    layer.forward
    for layer in (
        _BatchNorm,
        torch.nn.SyncBatchNorm,
        BatchNorm2d,
        BatchNormAct2d,
        SyncBatchNorm,
        SyncBatchNormAct2d,
    )
)


def _why_not(layer: _BatchNorm) -> str | None:
    """Why a layer cannot be replaced by one of ours; None where it can."""
    if "forward" in vars(layer) or type(layer).forward not in _FORWARDS:
        return "it has a forward of its own, which may compute something else"
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        return "it is lazy and has not seen an input yet"
    return None


def _converted(layer: _BatchNorm, process_group: Any) -> SyncBatchNorm:
    arguments = (*(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats),)
    found: SyncBatchNorm
    # On the meta device, since nothing of its own is kept.
    if isinstance(layer, BatchNormAct2d | SyncBatchNormAct2d):
        found = SyncBatchNormAct2d(*arguments, process_group=process_group, device="meta")
        found.activation, found.negative_slope, found.drop = (
            layer.activation,
            layer.negative_slope,
            layer.drop,
        )
    else:
        found = SyncBatchNorm(*arguments, process_group, device="meta")
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training"):
        setattr(found, name, getattr(layer, name))
    for name in ("skip_recompute", "skip_nonfinite", "qconfig"):
        if name in vars(layer):
            setattr(found, name, getattr(layer, name))
    return found
