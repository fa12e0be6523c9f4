"""A norm and what follows it, in one kernel where nobody looks in between; otherwise one after the other.

``fastreg.fuse`` rewrites models to call ``then`` and ``in_order``. Both look at the modules anew in every call, so a
hook that is registered later sees what it would have seen, and a module that is replaced later is the one that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from fastreg.nn import _activation
from fastreg.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norm_of
from fastreg.nn.group_norm import GroupNorm, group_norm_of
from fastreg.nn.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, instance_norm_of
from fastreg.nn.sync_batch_norm import SyncBatchNorm, sync_batch_norm_of

# (norm, input, residual, activation's name, negative slope) to the output; NotImplemented leaves this call to torch.
Kernel = Callable[[Any, torch.Tensor, torch.Tensor | None, str | None, float], Any]


@dataclass(frozen=True)
class Fusion:
    """How layers of a type are fused with what follows.

    Attributes:
        kernel: what computes a layer together with what follows.
        ready: whether a layer of the type is nothing but a norm; None: every one is.
        adds: whether an addition is among what the kernel computes.
    """

    kernel: Kernel
    ready: Callable[[Any], bool] | None = None
    adds: bool = True


_FUSIONS: dict[type[torch.nn.Module], Fusion] = {
    **dict.fromkeys((BatchNorm1d, BatchNorm2d, BatchNorm3d), Fusion(batch_norm_of)),
    SyncBatchNorm: Fusion(sync_batch_norm_of),
    GroupNorm: Fusion(group_norm_of, adds=False),
    **dict.fromkeys((InstanceNorm1d, InstanceNorm2d, InstanceNorm3d), Fusion(instance_norm_of, adds=False)),
}


def register(layer: type[torch.nn.Module], fusion: Fusion) -> None:
    """Let layers of exactly this type be fused with what follows."""
    _FUSIONS[layer] = fusion


def kernel_of(module: torch.nn.Module) -> Kernel | None:
    """What computes this norm together with what follows; None for everything else."""
    fusion = _FUSIONS.get(type(module))
    if fusion is None or not (fusion.ready is None or fusion.ready(module)):
        return None
    return fusion.kernel


def adds(norm: torch.nn.Module) -> bool:
    """Whether a norm is fused with an addition too."""
    return _FUSIONS[type(norm)].adds


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
        module: a norm, or a sequence that ends in one.
        activation: a module, the name of an activation, or None.
        negative_slope: of ``"leaky_relu"`` given by name.
        between: a ``torch.nn.Identity``, or None.
        in_place: whether the model adds the residual with ``+=``, which keeps the dtype of what it is added to.
    """
    while is_sequence(module) and not observed(module):
        layers = list(module._modules.values())
        if not layers:
            break
        input, module = _run(layers[:-1], input), layers[-1]  # type: ignore[assignment]
    kernel = kernel_of(module)
    if kernel is not None and _fits(input, residual) and not observed(module) and _is_nothing(between):
        found: tuple[str | None, float] | None = (None, negative_slope)
        if isinstance(activation, torch.nn.Module):
            found = None if observed(activation) else _activation.activation_of(activation)
        elif activation is not None:
            found = activation, negative_slope
        if found is not None:
            output = kernel(module, input, residual, *found)
            if output is not NotImplemented:
                return output  # type: ignore[no-any-return]
    return _one_after_the_other(module, input, residual, activation, negative_slope, between, in_place)


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


def ends_in_norm(module: torch.nn.Module) -> bool:
    """Whether this is a norm that can be fused, or a sequence with such a norm at its end."""
    while is_sequence(module) and len(module._modules) > 0:
        module = list(module._modules.values())[-1]  # type: ignore[assignment]
    return kernel_of(module) is not None


def is_activation(module: torch.nn.Module) -> bool:
    """Whether this is an activation that the norms fuse; the identity is none."""
    return type(module) is not torch.nn.Identity and _activation.activation_of(module) is not None


def name_of(activation: torch.nn.Module) -> str | None:
    """The name of an activation that the norms fuse."""
    found = _activation.activation_of(activation)
    return None if found is None else found[0]


def _fits(input: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Whether the sum has the input's dtype and shape, in torch too. A tracer's stand-ins for tensors never fit.

    Nor does the input itself as residual: torch.compile refuses an autograd.Function that gets one tensor twice.
    """
    stand_in = not isinstance(input, torch.Tensor)
    if stand_in or residual is None:
        return not stand_in
    return (
        isinstance(residual, torch.Tensor)
        and residual is not input
        and residual.dtype == input.dtype
        and residual.shape == input.shape
    )


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
