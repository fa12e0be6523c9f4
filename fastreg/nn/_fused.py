"""A norm or a dropout and what follows it, in one kernel where nobody looks in between; otherwise one after the other.

``fastreg.fuse`` rewrites models to call ``then``, ``then_norm`` and ``in_order``. They look at the modules anew in each
call, so a hook that is registered later sees what it would have seen, and a module that is replaced later is the one
that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from fastreg.nn import _activation
from fastreg.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norm_of
from fastreg.nn.dropout import Dropout, DropPath
from fastreg.nn.group_norm import GroupNorm, group_norm_of
from fastreg.nn.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, instance_norm_of
from fastreg.nn.layer_norm import LayerNorm
from fastreg.nn.rms_norm import RMSNorm
from fastreg.nn.sync_batch_norm import SyncBatchNorm, sync_batch_norm_of
from fastreg.ops.dropout import dropout_add
from fastreg.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastreg.ops.dropout_add_rms_norm import dropout_add_rms_norm

# (layer, input, residual, activation's name, negative slope) to the output; NotImplemented leaves this call to torch.
Kernel = Callable[[Any, torch.Tensor, torch.Tensor | None, str | None, float], Any]
# (norm, input, residual, options of dropout_add_layer_norm) to the output and the sum.
NormKernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Fusion:
    """How layers of a type are fused with what follows.

    Attributes:
        kernel: what computes a layer together with what follows.
        ready: whether a layer of the type is nothing but a norm, or a dropout that leaves its input as it is; None:
            every one is.
        adds: whether an addition is among what the kernel computes.
        activates: whether an activation is. A norm's kernel computes it, a dropout's does not.
        name: of such layers, in reports.
        branch: of a dropout, what it does to its input as options of ``dropout_add_layer_norm``, by (layer, input).
    """

    kernel: Kernel
    ready: Callable[[Any], bool] | None = None
    adds: bool = True
    activates: bool = True
    name: str = "norm"
    branch: Callable[[Any, torch.Tensor], dict[str, Any]] | None = None


def with_addition(
    add: Callable[..., torch.Tensor],
    name: str,
    branch: Callable[[Any, torch.Tensor], dict[str, Any]] | None = None,
) -> Fusion:
    """How dropouts are fused with the addition behind them, and with a norm of the sum.

    Args:
        add: what computes a layer, of (layer, input, residual); asked only in calls where something is dropped.
        name: of such layers, in reports.
        branch: as in ``Fusion``; if not given, the layer drops samples: without a residual, ``add`` of a one for each
            is what they are multiplied by.
    """

    def samples(layer: Any, input: torch.Tensor) -> dict[str, Any]:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        return {"p": 0.0, "row_scale": add(layer, input.new_ones(input.shape[0], dtype=dtype))}

    def kernel(layer: Any, input: torch.Tensor, residual: torch.Tensor | None, *_: Any) -> Any:
        return add(layer, input, residual) if residual is not None and _drops(layer) else NotImplemented

    return Fusion(kernel, _keeps_its_input, activates=False, name=name, branch=branch or samples)


def _drops(layer: Any) -> bool:
    """Whether a dropout drops anything; what a rate in a tensor is, only its device knows."""
    p = layer._rate()
    return bool(layer.training and (isinstance(p, torch.Tensor) or p > 0.0))


def _keeps_its_input(layer: Any) -> bool:
    return not getattr(layer, "inplace", False)


def _dropout_add(layer: Any, input: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return dropout_add(input, residual, layer.p)


_FUSIONS: dict[type[torch.nn.Module], Fusion] = {
    **dict.fromkeys((BatchNorm1d, BatchNorm2d, BatchNorm3d), Fusion(batch_norm_of)),
    SyncBatchNorm: Fusion(sync_batch_norm_of),
    GroupNorm: Fusion(group_norm_of, adds=False),
    **dict.fromkeys((InstanceNorm1d, InstanceNorm2d, InstanceNorm3d), Fusion(instance_norm_of, adds=False)),
    Dropout: with_addition(_dropout_add, "dropout", lambda layer, _: {"p": layer.p}),
    DropPath: with_addition(DropPath.forward, "drop path"),
}


def layer_norm_of_sum(norm: Any, input: torch.Tensor, residual: torch.Tensor, **branch: Any) -> Any:
    """Dropout, addition and a layer norm of the sum, with the sum."""
    parameters = (norm.normalized_shape, norm.weight, norm.bias)
    return dropout_add_layer_norm(input, residual, *parameters, eps=norm.eps, prenorm=True, **branch)


def rms_norm_of_sum(norm: Any, input: torch.Tensor, residual: torch.Tensor, **branch: Any) -> Any:
    """Dropout, addition and an RMS norm of the sum, with the sum."""
    parameters = (norm.normalized_shape, norm.weight)
    return dropout_add_rms_norm(input, residual, *parameters, eps=norm.eps, prenorm=True, **branch)


# The norms of rows, which are fused with what is in front of them.
_NORMS: dict[type[torch.nn.Module], NormKernel] = {LayerNorm: layer_norm_of_sum, RMSNorm: rms_norm_of_sum}


def register(layer: type[torch.nn.Module], fusion: Fusion | NormKernel) -> None:
    """Let layers of exactly this type be fused with what follows, or, being norms of rows, with what is before them."""
    if isinstance(fusion, Fusion):
        _FUSIONS[layer] = fusion
    else:
        _NORMS[layer] = fusion


def fusion_of(module: torch.nn.Module) -> Fusion | None:
    """How this layer is computed together with what follows it; None for everything else."""
    fusion = _FUSIONS.get(type(module))
    if fusion is None or not (fusion.ready is None or fusion.ready(module)):
        return None
    return fusion


def is_sequence(module: torch.nn.Module) -> bool:
    """Whether this is a ``torch.nn.Sequential`` whose forward is ``in_order``."""
    return getattr(type(module), "runs_in_order", False)


def observed(module: torch.nn.Module) -> bool:
    """Whether somebody would notice if this module was not called by itself: it has hooks, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def then(
    module: torch.nn.Module,
    input: torch.Tensor,
    residual: torch.Tensor | None = None,
    activation: torch.nn.Module | str | None = None,
    negative_slope: float = _activation.DEFAULT_SLOPE,
    between: torch.nn.Module | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """``activation(between(module(input)) + residual)``.

    Args:
        module: a norm or a dropout, or a sequence that ends in one.
        activation: a module, the name of an activation, or None.
        negative_slope: of ``"leaky_relu"`` given by name.
        between: a ``torch.nn.Identity``, or None.
        in_place: whether the model adds the residual with ``+=``, which keeps the dtype of what it is added to.
    """
    module, input = _last(module, input)
    fusion = fusion_of(module)
    if (
        fusion is not None
        and (fusion.activates or activation is None)
        and _fits(input, residual, fusion, in_place)
        and not observed(module)
        and _is_nothing(between)
    ):
        found: tuple[str | None, float] | None = (None, negative_slope)
        if isinstance(activation, torch.nn.Module):
            found = None if observed(activation) else _activation.activation_of(activation)
        elif activation is not None:
            found = activation, negative_slope
        if found is not None:
            output = fusion.kernel(module, input, residual, *found)
            if output is not NotImplemented:
                return output  # type: ignore[no-any-return]
    return _one_after_the_other(module, input, residual, activation, negative_slope, between, in_place)


def then_norm(
    module: torch.nn.Module,
    input: torch.Tensor,
    norm: torch.nn.Module,
    residual: torch.Tensor,
    between: torch.nn.Module | None = None,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum = between(module(input)) + residual`` and ``norm(sum)``; the arguments are those of ``then``.

    Args:
        module: a dropout, or a sequence that ends in one.
        norm: of rows.
    """
    module, input = _last(module, input)
    fusion, kernel = fusion_of(module), _NORMS.get(type(norm))
    if (
        fusion is not None
        and fusion.branch is not None
        and kernel is not None
        and _fits(input, residual, fusion, in_place)
        and _drops(module)
        and _norm_fits(input, residual, norm)
        and not (observed(module) or observed(norm))
        and _is_nothing(between)
    ):
        output, total = kernel(norm, input, residual, **fusion.branch(module, input))
        return total, output
    total = then(module, input, residual, between=between, in_place=in_place)
    return total, norm(total)


def _last(module: torch.nn.Module, input: torch.Tensor) -> tuple[torch.nn.Module, torch.Tensor]:
    """The last layer of a sequence, and the input that the layers before it make for it."""
    while is_sequence(module) and not observed(module):
        layers = list(module._modules.values())
        if not layers:
            break
        input, module = _run(layers[:-1], input), layers[-1]  # type: ignore[assignment]
    return module, input


def _norm_fits(input: torch.Tensor, residual: torch.Tensor, norm: Any) -> bool:
    """Whether the norm of the sum has the dtype that it has in torch, and the mask is the one of dropout alone."""
    ndim = len(norm.normalized_shape)
    return (
        residual.dtype == input.dtype
        # Elements are counted in memory by the dropout, row by row by the norm.
        and input.is_contiguous()
        and input.dim() > ndim
        and input.shape[input.dim() - ndim :] == tuple(norm.normalized_shape)
        # There the norm of a narrow sum is wide.
        and not (input.is_cuda and torch.is_autocast_enabled("cuda"))
    )


def in_order(self: torch.nn.Sequential, input: torch.Tensor) -> torch.Tensor:
    """``torch.nn.Sequential``'s forward, with every norm and the activation behind it in one kernel."""
    return _run(list(self._modules.values()), input)


def _run(layers: Sequence[Any], input: torch.Tensor) -> torch.Tensor:
    index = 0
    while index < len(layers):
        layer = layers[index]
        index += 1
        if index < len(layers) and ends_in_norm(layer) and is_activation(layers[index]):
            input = then(layer, input, activation=layers[index])
            index += 1
        else:
            input = layer(input)
    return input


def fusion_at_end(module: torch.nn.Module) -> Fusion | None:
    """How this layer, or the last one of a sequence, is computed together with what follows; None if not at all."""
    while is_sequence(module) and len(module._modules) > 0:
        module = list(module._modules.values())[-1]  # type: ignore[assignment]
    return fusion_of(module)


def is_norm_of_rows(module: torch.nn.Module) -> bool:
    """Whether this is a norm that is fused with a dropout and an addition before it."""
    return type(module) in _NORMS


def ends_in_norm(module: torch.nn.Module) -> bool:
    """Whether this is a norm that can be fused, or a sequence with such a norm at its end."""
    fusion = fusion_at_end(module)
    return fusion is not None and fusion.activates


def is_activation(module: torch.nn.Module) -> bool:
    """Whether this is an activation that the norms fuse; the identity is none."""
    return type(module) is not torch.nn.Identity and _activation.activation_of(module) is not None


def name_of(activation: torch.nn.Module) -> str | None:
    """The name of an activation that the norms fuse."""
    found = _activation.activation_of(activation)
    return None if found is None else found[0]


def _fits(input: torch.Tensor, residual: torch.Tensor | None, fusion: Fusion, in_place: bool) -> bool:
    """Whether the sum has the dtype and shape that it has in torch. A tracer's stand-ins for tensors never fit.

    Nor does the input itself as residual: torch.compile refuses an autograd.Function that gets one tensor twice.
    """
    stand_in = not isinstance(input, torch.Tensor)
    if stand_in or residual is None:
        return not stand_in
    if not isinstance(residual, torch.Tensor) or residual is input or residual.shape != input.shape:
        return False
    if residual.dtype == input.dtype:
        return True
    # The sum of a dropout is wider where the residual is, as torch's; a norm's never is.
    mixes = not fusion.activates and input.dtype in _SINGLE and residual.dtype in _SINGLE
    widens = torch.promote_types(input.dtype, residual.dtype) != input.dtype
    return mixes and not (in_place and widens)


# What the kernels of dropouts mix.
_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def _is_nothing(between: torch.nn.Module | None) -> bool:
    return between is None or (type(between) is torch.nn.Identity and not observed(between))


def _one_after_the_other(
    module: torch.nn.Module,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    activation: torch.nn.Module | str | None,
    negative_slope: float,
    between: torch.nn.Module | None,
    in_place: bool,
) -> torch.Tensor:
    output: torch.Tensor = module(input)
    if between is not None:
        output = between(output)
    if residual is not None and in_place:
        output += residual
    elif residual is not None:
        output = output + residual
    if activation is None:
        return output
    if isinstance(activation, torch.nn.Module):
        return activation(output)  # type: ignore[no-any-return]
    return _FUNCTIONS[activation](output, negative_slope)


# Torch's own functions, so that what is not fused has exactly torch's numbers.
_FUNCTIONS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "relu": lambda x, _: torch.relu(x),
    "leaky_relu": lambda x, slope: torch.nn.functional.leaky_relu(x, slope),
    "silu": lambda x, _: torch.nn.functional.silu(x),
    "gelu": lambda x, _: torch.nn.functional.gelu(x),
    "gelu_tanh": lambda x, _: torch.nn.functional.gelu(x, approximate="tanh"),
    "hardswish": lambda x, _: torch.nn.functional.hardswish(x),
}
