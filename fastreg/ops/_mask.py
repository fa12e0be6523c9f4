"""Where the masks of the dropout family come from: the seed, and the threshold that a rate stands for."""

from __future__ import annotations

import torch

from fastreg import _units

# Seeds of 63 bits: as far as torch.randint counts.
_SEEDS = 2**63 - 1


def is_rate(p: object) -> bool:
    """Whether a rate is a tensor, which is read on its device only."""
    return isinstance(p, torch.Tensor)


def check_rate(op: str, p: object, device: torch.device) -> None:
    """Check a rate as torch does; what a tensor holds is not looked at, since that would wait for its device.

    Raises:
        TypeError: p is neither a number nor a tensor.
        ValueError: a number outside 0 to 1 (torch's text), or a tensor of several elements, of integers or on another
            device.
    """
    if isinstance(p, torch.Tensor):
        if p.numel() != 1 or not p.is_floating_point():
            raise ValueError(
                f"{op}: p must be a number or a floating-point tensor of one element, but got a tensor of shape "
                f"{tuple(p.shape)} and dtype {p.dtype}"
            )
        if p.device != device:
            raise ValueError(
                f"{op}: p is on {p.device} and the input is on {device}; move one of them with .to(device)"
            )
        return
    if not isinstance(p, int | float):
        raise TypeError(f"{op}(): argument 'p' must be float or Tensor, not {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def threshold(p: float, lanes: int) -> int:
    """The lanes of ``lanes`` that are dropped at rate ``p``."""
    return round(p * lanes)


def dynamic_threshold(p: torch.Tensor, lanes: int) -> torch.Tensor:
    """The same of a rate in a tensor, as int64 on its device; beyond 0 to 1 it is cut off, and NaN is 0."""
    share = p.detach().double().clamp(0.0, 1.0) * lanes
    return share.round().to(torch.int64).clamp(min=0)


def thresholds(p: float | torch.Tensor, unit: int) -> tuple[int, torch.Tensor | None]:
    """The two arguments that a rate becomes: one for a number, the other for a tensor."""
    lanes = _units.lanes(unit)
    if isinstance(p, torch.Tensor):
        return 0, dynamic_threshold(p, lanes)
    return threshold(p, lanes), None


def seed_on(
    op: str,
    device: torch.device,
    seed: int | torch.Tensor | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """The seed of one call, an int64 tensor on ``device``: the one given, or one drawn from torch's generator.

    Raises:
        TypeError: a seed that is no int and no tensor.
        ValueError: a seed together with a generator; a tensor that is not one int64 on the device.
    """
    if seed is None:
        return torch.randint(_SEEDS, (), dtype=torch.int64, device=device, generator=generator)
    if generator is not None:
        raise ValueError(f"{op}: expected a seed or a generator, but got both")
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"{op}: a seed in a tensor must be one int64 on {device}, but got shape {tuple(seed.shape)}, "
                f"{seed.dtype} on {seed.device}"
            )
        return seed.detach()
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}(): argument 'seed' must be int, Tensor or None, not {type(seed).__name__}")
    # As two's complement: seeds of 64 bits are taken with or without a sign.
    return torch.tensor((seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
