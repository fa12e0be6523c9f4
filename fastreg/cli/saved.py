"""What a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def saved_bytes(forward: Callable[[], Any], given: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, those of ``given`` tensors not."""
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    sizes: dict[int, int] = {}
    # Kept alive until the end: freed storage would give its address to another one, which would not be counted.
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(sizes.values())
