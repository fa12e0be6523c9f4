"""What the workloads of the norms over channels share: layouts, random tensors, and how large is too large."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastreg import backends
from fastreg.cli.workloads import Case

LAYOUTS = ("contiguous", "channels_last")


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """``tensor`` in a layout; what has neither is left as it is."""
    if layout != "channels_last":
        return tensor
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.dim()])


def drawer(case: Case, device: torch.device) -> Callable[..., torch.Tensor]:
    """``random(dtype, *shape, scale=1.0, shift=0.0)``: normal numbers, tensors in the layout of the case."""
    # Drawn where they are used: a large tensor takes a CPU seconds.
    generator = torch.Generator(device).manual_seed(sum(case.shape))

    def random(dtype: torch.dtype, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=device).mul_(scale).add_(shift).to(dtype)
        return laid_out(values, case.layout) if values.dim() > 1 else values

    return random


# On a CPU plain PyTorch takes seconds, and many times the tensor's memory, beyond this.
_REFERENCE_ELEMENTS = 2**22


def left_out(op: str, input: torch.Tensor, passes: int = 1) -> dict[str, str]:
    """The reference is timed on small tensors only, unless it is what a user's call runs.

    Args:
        passes: how many times more it does than for a norm.
    """
    most = _REFERENCE_ELEMENTS // passes
    large = input.device.type == "cpu" and input.numel() > most
    if not large or backends.pick(op, input) == "reference":
        return {}
    name = op.replace("_", " ")
    size = f"{most >> 20} million"
    return {"reference": f"plain PyTorch takes seconds a step on more than {size} elements of a CPU's {name}"}
