"""The random stream of every mask, Philox4x32-10, in torch operations on int64 tensors; csrc/philox.h says more."""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox(seed: torch.Tensor, *counter: torch.Tensor | int) -> tuple[torch.Tensor, ...]:
    """Four words for each counter of four words; all are int64 tensors of values below 2^32."""
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    words: list[torch.Tensor | int] = [*counter]
    for _ in range(_ROUNDS):
        # Products of 64 bits wrap, and shifting copies the sign, which the mask removes.
        products = [multiplier * words[place] for multiplier, place in zip(_MULTIPLIERS, (0, 2), strict=True)]
        high = [(product >> 32) & _WORD for product in products]
        words = [
            high[1] ^ words[1] ^ keys[0],
            products[1] & _WORD,
            high[0] ^ words[3] ^ keys[1],
            products[0] & _WORD,
        ]
        keys = [(key + step) & _WORD for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return tuple(words)  # type: ignore[arg-type]


def _blocks(seed: torch.Tensor, count: int) -> torch.Tensor:
    """The words of the first ``count`` blocks, (count, 4)."""
    blocks = torch.arange(count, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(blocks)
    return torch.stack(philox(seed.reshape(()), blocks & _WORD, blocks >> 32, zero, zero), dim=-1)


def half_lanes(seed: torch.Tensor, count: int) -> torch.Tensor:
    """The 16-bit lanes of units 0 to ``count`` - 1."""
    words = _blocks(seed, -(-count // 8))
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)[:count]


def lanes(seed: torch.Tensor, count: int) -> torch.Tensor:
    """The 32-bit lanes of units 0 to ``count`` - 1."""
    return _blocks(seed, -(-count // 4)).reshape(-1)[:count]
