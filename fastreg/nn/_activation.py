"""Which of torch's activation modules the fused norms know, and under what name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastreg import _activations
from fastreg.backends.reference._activations import activate

_BY_TYPE: dict[type[torch.nn.Module], str] = {
    torch.nn.Identity: "identity",
    torch.nn.ReLU: "relu",
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.SiLU: "silu",
    torch.nn.GELU: "gelu",
    torch.nn.Hardswish: "hardswish",
}

DEFAULT_SLOPE = 0.01


def activation_of(module: torch.nn.Module) -> tuple[str, float] | None:
    """The name and the negative slope of an activation module of exactly one of torch's types, or None."""
    name = _BY_TYPE.get(type(module))
    if name is None:
        return None
    if isinstance(module, torch.nn.GELU):
        forms = {"none": "gelu", "tanh": "gelu_tanh"}
        return (forms[module.approximate], DEFAULT_SLOPE) if module.approximate in forms else None
    slope = module.negative_slope if isinstance(module, torch.nn.LeakyReLU) else DEFAULT_SLOPE
    return name, slope


ActivationLayer = str | type[torch.nn.Module] | Callable[..., torch.nn.Module] | None


def resolve(kind: str, layer: ActivationLayer, options: Mapping[str, Any] | None) -> tuple[str, float]:
    """The activation that the constructor's ``act_layer`` and ``act_kwargs`` mean: its name and its negative slope.

    Raises:
        ValueError: it is none of those that the norms fuse.
    """
    options = dict(options or {})
    if layer is None:
        return "identity", DEFAULT_SLOPE
    if isinstance(layer, str):
        name = _activations.NAMES[_activations.number(kind, layer)]
        return name, float(options.get("negative_slope", DEFAULT_SLOPE))
    found = activation_of(layer(**options))
    if found is None:
        raise ValueError(
            f"{kind}: {getattr(layer, '__name__', layer)!r} is none of the activations that a norm can end "
            f"with: expected torch.nn.ReLU, LeakyReLU, SiLU, GELU, Hardswish or Identity, or one of the names "
            f"{', '.join(_activations.NAMES)}"
        )
    return found


def described(name: str, negative_slope: float) -> str:
    """What a layer's ``extra_repr`` says of its activation."""
    slope = f", negative_slope={negative_slope}" if name == "leaky_relu" else ""
    return f"activation={name}{slope}"


def apply(argument: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    """The activation on its own, where there is nothing that it could be fused with."""
    return activate(argument, _activations.number("activation", name), negative_slope)
