"""The layouts that the norms over channels are measured in."""

from __future__ import annotations

import torch

LAYOUTS = ("contiguous", "channels_last")


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """``tensor`` in a layout; what has neither is left as it is."""
    if layout != "channels_last":
        return tensor
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.dim()])
