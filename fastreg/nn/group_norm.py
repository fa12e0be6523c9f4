"""Group normalisation as modules: torch's, and the one that also applies an activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastreg.nn import _activation
from fastreg.ops.group_norm import group_norm


def group_norm_of(
    layer: torch.nn.GroupNorm,
    input: torch.Tensor,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = _activation.DEFAULT_SLOPE,
) -> Any:
    """The call of ``group_norm`` that a layer stands for; NotImplemented with a residual, which it does not add."""
    if residual is not None:
        return NotImplemented
    return group_norm(
        *(input, layer.num_groups, layer.weight, layer.bias, layer.eps),
        activation=activation,
        negative_slope=negative_slope,
    )


class GroupNorm(torch.nn.GroupNorm):
    """``torch.nn.GroupNorm`` with fastreg's kernels: same arguments, same parameters, same state dict.

    Equivalent to ``torch.nn.GroupNorm(num_groups, num_channels, eps, affine)``; the formula, the dtypes and what is
    raised are those of ``fastreg.functional.group_norm``. Keeps channels_last; parameters of any dtype go with any
    input.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return group_norm_of(self, input)  # type: ignore[no-any-return]


class GroupNormAct(GroupNorm):
    """Group normalisation and an activation in one kernel; timm's argument names and order.

    Equivalent to ``act_layer(**act_kwargs)(torch.nn.GroupNorm(num_groups, num_channels, eps, affine)(x))``; parameters
    and state dict are those of ``torch.nn.GroupNorm``.

    Args:
        num_channels: of the input.
        num_groups: the number of groups, unless group_size is given.
        eps, affine: as in ``torch.nn.GroupNorm``.
        group_size: channels a group, instead of their number.
        apply_act: False leaves the activation out.
        act_layer: torch.nn.ReLU, LeakyReLU, SiLU, GELU, Hardswish or Identity, a name that ``group_norm`` knows, or
            None.
        act_kwargs: its arguments, such as ``{"negative_slope": 0.1}``.
        inplace: accepted as in timm; there is no tensor between norm and activation that could be overwritten.
        drop_layer: makes a module that is applied between norm and activation, which then run one after the other.
        device, dtype: of the parameters.

    Attributes:
        activation, negative_slope: what act_layer and act_kwargs came to.
        drop: what drop_layer made, or None.

    Raises:
        ValueError: num_channels is no multiple of num_groups, or of group_size; an activation that norms do not fuse.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        group_size: int | None = None,
        apply_act: bool = True,
        act_layer: _activation.ActivationLayer = torch.nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], torch.nn.Module] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if group_size:
            if num_channels % group_size != 0:
                raise ValueError(
                    f"num_channels ({num_channels}) must be divisible by group_size ({group_size})"
                )
            num_groups = num_channels // group_size
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self.activation, self.negative_slope = _activation.resolve(
            "GroupNormAct", act_layer if apply_act else None, act_kwargs
        )
        self.drop = None if drop_layer is None else drop_layer()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.drop is None:
            return group_norm_of(  # type: ignore[no-any-return]
                self, input, None, self.activation, self.negative_slope
            )
        return _activation.apply(self.drop(group_norm_of(self, input)), self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_activation.described(self.activation, self.negative_slope)}"
