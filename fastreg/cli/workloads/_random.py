"""What the workloads of the random ops share: fastreg's seed, and the exact results where a mask is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from fastreg.cli.gate import Exact, stretch
from fastreg.cli.workloads import SEED

# Elements of a stretch in float64 that stays in a CPU's last cache level.
_STRETCH = 2**18


def seed_drawn(device: torch.device) -> torch.Tensor:
    """The seed that a call of fastreg draws from torch's stream at ``SEED``: its first number, an int64."""
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)


def without_zeros(gradient: torch.Tensor) -> torch.Tensor:
    """``gradient`` with no element so small that the input's gradient could be 0 where something is kept."""
    return gradient.abs().clamp_min_(2.0**-10).copysign_(gradient)


def stretches(tensor: torch.Tensor) -> Iterator[slice]:
    """The first dimension in parts."""
    count = tensor.shape[0]
    step = max(1, stretch(tensor.device, _STRETCH) * count // max(1, tensor.numel()))
    for start in range(0, count, step):
        yield slice(start, start + step)


def exact_results(
    arguments: Mapping[str, torch.Tensor], grad_output: torch.Tensor, kept: torch.Tensor, scale: float
) -> Iterator[Exact]:
    """Output and gradients of a mask applied to the input, and a residual added if there is one.

    Args:
        kept: the mask, of the input's shape, or 1 where all of a dimension share it.
        scale: of what is kept. Of what is dropped no rounding is allowed for: it is 0, or the residual.
    """
    kept = kept.expand(*grad_output.shape[:1], *kept.shape[1:])
    with torch.no_grad():
        for part in stretches(grad_output):
            mask = kept[part]

            def dropped(values: torch.Tensor, mask: torch.Tensor = mask) -> torch.Tensor:
                return torch.where(mask, values, 0.0)

            branch = dropped(arguments["input"][part].double() * scale)
            gradient = grad_output[part].double()
            output, terms = branch, branch.abs()
            if "residual" in arguments:
                residual = arguments["residual"][part].double()
                output, terms = branch + residual, dropped(terms + residual.abs())
                yield Exact("grad_residual", gradient, torch.zeros_like(gradient), (part,))
            yield Exact("output", output, terms, (part,))
            gradient = dropped(gradient * scale)
            yield Exact("grad_input", gradient, gradient.abs(), (part,))
