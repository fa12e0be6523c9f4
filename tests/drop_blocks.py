"""What DropBlock must return: its cases, and the exact values from masks.py and the closed form of its rate."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import fastreg
from backend_under_test import dtypes_for
from cases import CHANNEL_LAYOUTS, LAYOUTS, SHORT, covering
from criterion import Exact, Rejected, check
from masks import keep_blocks
from suite import same_bits, unwritten_memory_is_nan

LANES = 2**32
# Maps and the blocks that each is tested with: even, odd, rectangular, as large as the map, larger; wider than words.
SIZES: tuple[tuple[tuple[int, ...], int | tuple[int, ...]], ...] = (
    ((2, 3, 7, 7), 3),
    ((3, 8, 7, 7), 7),
    ((2, 5, 8, 8), 4),
    ((2, 2, 14, 14), 7),
    ((1, 3, 5, 19), (2, 5)),
    ((2, 1, 1, 1), 1),
    ((1, 9, 3, 2), 5),
    ((1, 2, 6, 70), (3, 33)),
    ((1, 1, 67, 9), (40, 1)),
    ((2, 16, 4, 9), (1, 2)),
    ((2, 3, 3, 4, 5), 2),
    ((1, 2, 2, 5, 9), (2, 3, 7)),
)
_LAYOUTS = {
    name: CHANNEL_LAYOUTS[name]
    for name in ("contiguous", "channels_last", "unaligned", "channels", "transposed")
}
_GRAD_LAYOUTS = {**_LAYOUTS, "scalar": LAYOUTS["scalar"]}


@dataclass(frozen=True)
class DropBlock:
    """Everything that decides one run."""

    size: tuple[tuple[int, ...], int | tuple[int, ...]]
    dtype: torch.dtype
    layout: str
    grad_layout: str
    p: float
    in_tensor: bool
    gamma: str
    seeds: str
    shared: bool
    rescale: str | None
    inplace: bool
    seed: int = 7

    def __str__(self) -> str:
        shape, block = self.size
        flags = "".join(f"-{name}" for name in ("shared", "inplace") if getattr(self, name))
        return (
            f"{'x'.join(map(str, shape))}-b{block}-{SHORT[self.dtype]}-{self.layout}-dy_{self.grad_layout}-p{self.p}"
            f"{'t' if self.in_tensor else ''}-{self.gamma}-{self.seeds}-{self.rescale}{flags}"
        ).replace(" ", "")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size[0]

    @property
    def block(self) -> tuple[int, ...]:
        """Cut off at the map."""
        spatial, block = self.shape[2:], self.size[1]
        if isinstance(block, int):
            return (min(block, *spatial),) * len(spatial)
        return tuple(min(one, other) for one, other in zip(block, spatial, strict=True))

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (self.shape[0], 1 if self.shared else self.shape[1], *self.shape[2:])


def drop_blocks(backend: str, device: str, only: str | None = None) -> list[DropBlock]:
    """The covering choice of cases for a backend."""
    choices = covering(
        {
            "size": SIZES,
            "dtype": dtypes_for(backend, device, only),
            "layout": list(_LAYOUTS),
            "grad_layout": list(_GRAD_LAYOUTS),
            "p": (0.1, 0.5, 1.0, 1e-3),
            "in_tensor": (False, True),
            "gamma": ("paper", "exact"),
            "seeds": ("valid", "anywhere"),
            "shared": (False, True),
            "rescale": ("batch", "sample", "expected", None),
            "inplace": (False, True),
        },
        apart=[("grad_layout", "p")],
        candidates=8,
    )
    chosen = [DropBlock(**choice) for choice in choices]
    return list({str(case): case for case in chosen}.values())


# --- the rate, by brute force -----------------------------------------------------------------------------


def covering_seeds(spatial: Sequence[int], block: Sequence[int], anywhere: bool) -> torch.Tensor:
    """How many seeds could cover each position: blocks are laid out one by one."""
    numbers = torch.zeros(tuple(spatial), dtype=torch.float64)
    places = [size if anywhere else size - length + 1 for size, length in zip(spatial, block, strict=True)]
    for place in itertools.product(*map(range, places)):
        first = [at - (length // 2 if anywhere else 0) for at, length in zip(place, block, strict=True)]
        numbers[tuple(slice(max(at, 0), at + length) for at, length in zip(first, block, strict=True))] += 1
    return numbers


def expected_share(gamma: float, numbers: torch.Tensor) -> float:
    """The expected share of dropped positions."""
    return float((1.0 - (1.0 - gamma) ** numbers).mean())


def gamma_of(case: DropBlock) -> float:
    """The probability of a seed, by its definition."""
    spatial, block = case.shape[2:], case.block
    if case.gamma == "paper":
        places = math.prod(size - length + 1 for size, length in zip(spatial, block, strict=True))
        return min(1.0, case.p * math.prod(spatial) / (math.prod(block) * places))
    numbers = covering_seeds(spatial, block, case.seeds == "anywhere")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_share(middle, numbers) < case.p else (low, middle)
    return 1.0 if case.p == 1.0 else (low + high) / 2


# --- one case ---------------------------------------------------------------------------------------------


def keep_of(case: DropBlock) -> torch.Tensor:
    """Which positions are kept."""
    threshold = round(gamma_of(case) * LANES)
    return keep_blocks(case.mask_shape, case.block, case.seed, threshold, case.seeds == "anywhere")


def scale_of(case: DropBlock, keep: torch.Tensor) -> torch.Tensor:
    """What is kept is multiplied by this."""
    if case.rescale is None:
        return torch.ones((), dtype=torch.float64)
    if case.rescale == "expected":
        numbers = covering_seeds(case.shape[2:], case.block, case.seeds == "anywhere")
        share = expected_share(round(gamma_of(case) * LANES) / LANES, numbers)
        return torch.tensor(1.0 / (1.0 - share) if share < 1.0 else 0.0, dtype=torch.float64)
    dimensions = tuple(range(0 if case.rescale == "batch" else 1, keep.dim()))
    share = keep.double().mean(dim=dimensions, keepdim=True)
    return torch.where(share > 0, 1.0 / share, 0.0)


def make_tensors(case: DropBlock, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random input and grad_output of a case, the same ones on every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    values = [1.5 * torch.randn(case.shape, generator=generator, dtype=torch.float64) + 0.3 for _ in range(2)]
    input, grad_output = (each.to(case.dtype).to(device) for each in values)
    return _LAYOUTS[case.layout](input), _GRAD_LAYOUTS[case.grad_layout](grad_output)


def run(case: DropBlock, input: torch.Tensor, grad_output: torch.Tensor) -> dict[str, torch.Tensor]:
    """The public function's output and gradient."""
    function = getattr(fastreg.functional, f"drop_block{len(case.shape) - 2}d")
    leaf = input.detach().requires_grad_()
    given = torch.empty_strided(case.shape, input.stride(), dtype=case.dtype, device=input.device).copy_(leaf)
    p = torch.tensor(case.p, dtype=torch.float64, device=input.device) if case.in_tensor else case.p
    output = function(
        *(given if case.inplace else leaf, p, case.size[1], case.inplace),
        **{name: getattr(case, name) for name in ("gamma", "seeds", "shared", "rescale", "seed")},
    )
    if case.inplace and output is not given:
        raise Rejected("output is not the input, though inplace")
    return {"output": output.detach(), "grad_input": torch.autograd.grad(output, leaf, grad_output)[0]}


def check_drop_block(case: DropBlock, device: str) -> None:
    """Raise ``Rejected`` where DropBlock breaks its contract in this case."""
    input, grad_output = make_tensors(case, device)
    before = input.clone(), grad_output.clone()
    with unwritten_memory_is_nan():
        results, again = run(case, input, grad_output), run(case, input, grad_output)
    if not (same_bits(input, before[0]) and same_bits(grad_output, before[1])):
        raise Rejected("input or grad_output was written to")
    keep = keep_of(case)
    scale = scale_of(case, keep)
    keep = keep.expand(case.shape)
    # A rate in a tensor is interpolated: its expected share is off by 1e-6 at most.
    loose = (
        1e-6 / (16 * 2.0 ** (-53 if case.dtype == torch.float64 else -24))
        if case.in_tensor and case.rescale == "expected"
        else 1.0
    )
    for name, given in (("output", input), ("grad_input", grad_output)):
        value = torch.where(keep, given.cpu().double() * scale, 0.0)
        check(name, results[name], Exact(value, loose * value.abs(), case.dtype))
        if results[name].cpu()[~keep].ne(0).any():
            raise Rejected(f"{name} is not zero where a block is dropped")
        if not same_bits(results[name], again[name]):
            raise Rejected(f"{name} differs between two runs")
    kept_layout = case.layout in ("contiguous", "channels_last")
    if kept_layout and results["output"].stride() != input.stride():
        raise Rejected(f"the output has strides {results['output'].stride()}, the input {input.stride()}")
