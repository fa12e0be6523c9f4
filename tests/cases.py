"""The cases an op is tested in: sizes, dtypes, layouts and data, and a small choice of them that covers every pair.

A full product would take hours. ``covering`` picks cases so that every pair of levels of two different factors
("bfloat16 with an unaligned view", "8193 columns with an expanded grad_output") meets in at least one case, which is
where layout bugs live.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

SHORT = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
    None: "none",
}


@dataclass(frozen=True)
class Size:
    """One input shape with the arguments that go with it, for instance ``{"normalized_shape": (4, 5)}``."""

    shape: tuple[int, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))


@dataclass(frozen=True)
class Mix:
    """The dtypes of an op's tensors, the input's first; None where a parameter is not given."""

    dtypes: tuple[torch.dtype | None, ...]

    @property
    def input(self) -> torch.dtype:
        dtype = self.dtypes[0]
        assert dtype is not None
        return dtype

    def __str__(self) -> str:
        return "-".join(SHORT[dtype] for dtype in self.dtypes)


@dataclass(frozen=True)
class Case:
    """Everything that decides one run of an op.

    Attributes:
        layout, grad_layout, companion_layout, parameter_layout: names in the op's layouts.
        data: a name in ``DATA``.
        wanted: the tensors whose gradient is asked for.
        arguments: the non-tensor arguments, those of the size included.
    """

    size: Size
    mix: Mix
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    parameter_layout: str = "contiguous"
    data: str = "plain"
    wanted: tuple[str, ...] = ("input", "weight", "bias")
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    companion_layout: str = "contiguous"

    def __str__(self) -> str:
        wanted = "".join(name[0] for name in self.wanted) or "none"
        options = "".join(f"-{name}={value}" for name, value in self.arguments.items())
        companion = "" if self.companion_layout == "contiguous" else f"-r_{self.companion_layout}"
        return (
            f"{self.size}-{self.mix}-{self.layout}-dy_{self.grad_layout}{companion}-w_{self.parameter_layout}"
            f"-{self.data}-d_{wanted}{options}"
        )


# --- data -------------------------------------------------------------------------------------------------

_HUGE = {torch.float16: 5e3, torch.bfloat16: 1e15, torch.float32: 1e15, torch.float64: 1e100}
_TINY = {torch.float16: 1e-4, torch.bfloat16: 1e-15, torch.float32: 1e-15, torch.float64: 1e-100}
_OFFSET = {torch.float16: 60.0, torch.bfloat16: 60.0, torch.float32: 1000.0, torch.float64: 1000.0}

Generate = Callable[[tuple[int, ...], torch.dtype, torch.Generator], torch.Tensor]


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Each is aimed at a mistake: a mean far from zero at a one-pass variance, a variance of the size of eps at an eps
# in the wrong place, huge and tiny values at sums that overflow or vanish in the input's dtype.
DATA: dict[str, Generate] = {
    "plain": lambda shape, dtype, generator: 1.5 * _normal(shape, generator) + 0.3,
    "offset": lambda shape, dtype, generator: _normal(shape, generator) + _OFFSET[dtype],
    "near_eps": lambda shape, dtype, generator: 3e-3 * _normal(shape, generator) + 1e-3,
    "huge": lambda shape, dtype, generator: _HUGE[dtype] * _normal(shape, generator),
    "tiny": lambda shape, dtype, generator: _TINY[dtype] * _normal(shape, generator),
}


# --- layouts ----------------------------------------------------------------------------------------------


def _surrounded(shape: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """An uninitialised-looking buffer: NaN wherever the view that is cut from it does not reach."""
    return torch.full(tuple(shape), torch.nan, dtype=values.dtype, device=values.device)


def _offset(values: torch.Tensor, elements: int = 1) -> torch.Tensor:
    flat = _surrounded((values.numel() + 2 * elements,), values)
    view = flat[elements : elements + values.numel()].view(values.shape)
    return view.copy_(values)


def _sliced(values: torch.Tensor, before: int, after: int) -> torch.Tensor:
    columns = values.shape[-1]
    wide = _surrounded((*values.shape[:-1], before + columns + after), values)
    return wide[..., before : before + columns].copy_(values)


def _every_second_row(values: torch.Tensor) -> torch.Tensor:
    if values.dim() < 2:
        return values
    buffer = _surrounded((2 * values.shape[0], *values.shape[1:]), values)
    return buffer[::2].copy_(values)


def _every_second_column(values: torch.Tensor) -> torch.Tensor:
    buffer = _surrounded((*values.shape[:-1], 2 * values.shape[-1]), values)
    return buffer[..., ::2].copy_(values)


def _transposed(values: torch.Tensor) -> torch.Tensor:
    return values.transpose(0, -1).contiguous().transpose(0, -1)


def _first_row_expanded(values: torch.Tensor) -> torch.Tensor:
    return values[:1].expand(values.shape) if values.dim() > 1 and values.shape[0] else values


def _scalar_expanded(values: torch.Tensor) -> torch.Tensor:
    return (
        values.flatten()[:1].reshape((1,) * values.dim()).expand(values.shape) if values.numel() else values
    )


# "scalar" is what ``output.sum().backward()`` passes as grad_output: every stride is 0.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda values: values,
    "unaligned": _offset,
    "sliced": lambda values: _sliced(values, 8, 8),
    "sliced_odd": lambda values: _sliced(values, 1, 2),
    "rows": _every_second_row,
    "columns": _every_second_column,
    "transposed": _transposed,
    "expanded": _first_row_expanded,
    "scalar": _scalar_expanded,
}


def _channels_last(values: torch.Tensor, place: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Channels adjacent, where ``place`` puts them."""
    return place(values.movedim(1, -1).contiguous()).movedim(-1, 1)


def _slice_of_channels(values: torch.Tensor) -> torch.Tensor:
    wide = _surrounded((values.shape[0], 3 + values.shape[1] + 2, *values.shape[2:]), values)
    return wide[:, 3 : 3 + values.shape[1]].copy_(values)


# What norms over channels read in place, and what they copy: transposed, and every second column.
CHANNEL_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda values: values,
    "channels_last": lambda values: _channels_last(values, lambda rows: rows),
    "unaligned": _offset,
    "channels_last_unaligned": lambda values: _channels_last(values, _offset),
    "channels": _slice_of_channels,
    "channels_last_channels": lambda values: _channels_last(values, lambda rows: _sliced(rows, 8, 8)),
    "channels_last_odd": lambda values: _channels_last(values, lambda rows: _sliced(rows, 1, 2)),
    "samples": _every_second_row,
    "columns": _every_second_column,
    "transposed": _transposed,
    "expanded": _first_row_expanded,
    "scalar": _scalar_expanded,
}


# --- a covering choice ------------------------------------------------------------------------------------


def covering(
    factors: Mapping[str, Sequence[Any]],
    apart: Collection[tuple[str, str]] = (),
    seed: int = 0,
    candidates: int = 24,
) -> list[dict[str, Any]]:
    """A small list of choices of one level a factor in which every pair of levels of two factors occurs.

    The pairs of factors in ``apart`` are spared: their levels meet only by chance.

    Greedy: each new choice starts from a pair that is still missing and is the best of a few random completions.
    """
    draw = random.Random(seed)
    names = list(factors)
    positions = range(len(names))
    levels = [range(len(factors[name])) for name in names]
    missing = {
        ((first, a), (second, b))
        for first, second in itertools.combinations(positions, 2)
        if (names[first], names[second]) not in apart
        for a in levels[first]
        for b in levels[second]
    }
    chosen: list[list[int]] = []
    while missing:
        start = min(missing)
        best: list[int] = []
        best_pairs: set[Any] = set()
        for _ in range(candidates):
            choice = [draw.choice(options) for options in levels]
            for position, level in start:
                choice[position] = level
            pairs = set(itertools.combinations(enumerate(choice), 2)) & missing
            if len(pairs) > len(best_pairs):
                best, best_pairs = choice, pairs
        chosen.append(best)
        missing -= best_pairs
    return [
        {name: factors[name][level] for name, level in zip(names, choice, strict=True)} for choice in chosen
    ]
