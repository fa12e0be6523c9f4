"""The equality gate: a provider that is not right is not timed.

Results are compared with the formula computed in float64 from the same rounded inputs. An element may be off by half a
unit in the last place of its own dtype, plus sixteen fp32 roundings of the terms that were added to make it:

    |actual - exact| <= 0.51 * eps(dtype) * |exact| + 16 * 2^-24 * terms

(the first part is 0 for fp32 and fp64; for fp64 the unit is 2^-53, twice, since the exact value is itself computed in
fp64). fastreg has to stay within it. Other libraries are the yardstick of speed and not on trial: they only have to
compute the same thing, so their error is held against the largest value of each result, with an allowance that goes by
the activation's dtype: torch.compile may make a fp32 parameter's gradient from values rounded to bfloat16. For sums in
half precision that allowance is wide, because torch's layer norm on the CPU adds the parameters' gradients up in that
dtype: bfloat16 over 8192 rows is 5 to 19 % off, by the number of threads.

A random op's results are held to the formula for the mask that was drawn. fastreg's mask is known from the seed; that
of another library is read off its results, and the share that it drops has to be within six standard deviations of what
was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch

ROUNDINGS = 16
PEER_ALLOWANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 0.03}
PEER_ALLOWANCE_OF_SUMS = {**PEER_ALLOWANCE, torch.float16: 0.4, torch.bfloat16: 0.4}

DEVIATIONS = 6

Results = Mapping[str, torch.Tensor]
"""What one call returned, by name: "output", "grad_input", "grad_weight", ..."""


@dataclass(frozen=True)
class Exact:
    """The exact value of one result, or of a part of it (so that float64 copies stay small).

    Attributes:
        name: which result.
        value: the exact value in float64.
        terms: the sum of the absolute values of the terms added to make each element.
        part: the slices of the result that ``value`` covers; None for a sum over all rows, or over the batch.
    """

    name: str
    value: torch.Tensor
    terms: torch.Tensor
    part: tuple[slice, ...] | None = None


def stretch(device: torch.device, in_cache: int) -> int:
    """How many elements of the exact results to compute at a time.

    Args:
        in_cache: as many as stay in a CPU's last cache level; a GPU takes enough to keep all of it busy.
    """
    return 2**25 if device.type == "cuda" else in_cache


@dataclass(frozen=True)
class Verdict:
    """How far off the worst element of all results is.

    Attributes:
        budget_used: as a share of its rounding budget; infinity where it is not a number or there is no such element.
        relative_error: as a share of the largest value of its result.
        allowance_used: that, as a share of what another library is allowed.
        worst: the name of the result that uses most of its budget.
    """

    budget_used: float = 0.0
    relative_error: float = 0.0
    allowance_used: float = 0.0
    worst: str = ""

    def refusal(self, peer: bool) -> str | None:
        """Why these results may not be timed, or None."""
        if peer and not self.allowance_used <= 1:
            return f"{self.worst} is off by {self.relative_error:.2g} of its largest value"
        if not peer and not self.budget_used <= 1:
            return f"{self.worst} is off by {self.budget_used:.3g} times its rounding budget"
        return None


def budget(exact: Exact, dtype: torch.dtype) -> torch.Tensor:
    """The largest error allowed for each element of a result in that dtype."""
    limits = torch.finfo(dtype)
    unit = 2 * 2.0**-53 if dtype == torch.float64 else 2.0**-24
    allowed = (ROUNDINGS * unit * exact.terms).add_(limits.smallest_normal)
    if limits.bits == 16:
        size = exact.value.abs().clamp_min_(limits.smallest_normal)
        allowed.add_(size, alpha=0.51 * limits.eps)
    return allowed


def verdict(results: Results, exact: Exact, budget_of: Callable[[torch.dtype], torch.Tensor]) -> Verdict:
    """Compare one result, or the part of it that ``exact`` covers, within the budget of its dtype."""
    found = results[exact.name].detach()
    if exact.part is not None:
        found = found[exact.part]
    if found.shape != exact.value.shape:
        return Verdict(math.inf, math.inf, math.inf, exact.name)
    if found.numel() == 0:
        return Verdict()
    error = (found.double() - exact.value).abs_()
    largest = torch.linalg.vector_norm(exact.value, math.inf)
    largest = largest.clamp_min(torch.finfo(found.dtype).smallest_normal)
    shares = [float(error.max() / largest), float(error.div_(budget_of(found.dtype)).max())]
    relative, used = (math.inf if math.isnan(share) else share for share in shares)
    allowance = PEER_ALLOWANCE_OF_SUMS if exact.part is None else PEER_ALLOWANCE
    return Verdict(used, relative, relative / allowance[results["output"].dtype], exact.name)


class Implausible(ValueError):
    """What another library dropped is not what was asked for."""


def check_share(kept: torch.Tensor, expected: float, deviation: float) -> None:
    """Whether a mask drops the share that it should.

    Args:
        kept: the mask, true where something is kept.
        expected: the share to be dropped.
        deviation: the standard deviation of the share, or more.

    Raises:
        Implausible: it does not.
    """
    share = 1 - int(kept.sum()) / kept.numel()
    away = abs(share - expected) / deviation
    if away > DEVIATIONS:
        raise Implausible(
            f"{share:.4g} is dropped where {expected:.4g} was expected, {away:.2g} standard deviations away"
        )


def judge(candidates: Mapping[str, Results], truth: Iterable[Exact]) -> dict[str, Verdict]:
    """The verdict on each candidate, over all its results; one pass over the exact values."""
    worst = {name: Verdict() for name in candidates}
    for exact in truth:
        budget_of = cache(partial(budget, exact))
        for name, results in candidates.items():
            found, known = verdict(results, exact, budget_of), worst[name]
            worst[name] = Verdict(
                max(known.budget_used, found.budget_used),
                max(known.relative_error, found.relative_error),
                max(known.allowance_used, found.allowance_used),
                found.worst if found.budget_used > known.budget_used else known.worst,
            )
    return worst
