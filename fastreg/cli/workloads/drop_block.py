"""How DropBlock is measured: the stages of a ResNet-50, where every channel has a mask of its own, as in torchvision.

The chain "shared" has one mask for all channels of a sample and blocks that are cut off at the border, as timm.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fastreg import _units, functional
from fastreg.backends.reference import drop_block as formula
from fastreg.cli.gate import Exact, Implausible, Results, check_share
from fastreg.cli.workloads import BACKWARD, BOTH, FORWARD, Case, Function, Problem, points
from fastreg.cli.workloads._maps import LAYOUTS, drawer, left_out
from fastreg.cli.workloads._random import exact_results, seed_drawn, without_zeros
from fastreg.ops import _drop_block_rate

P = 0.1
BLOCK = 7

# Channels and the side of the map of every stage of a ResNet-50 on images of 224 x 224, inside of a block and behind.
RESNET_50 = ((64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))


def _maps(samples: int, *stages: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    return tuple((samples, channels, side, side) for channels, side in stages)


GRID = {
    # torch's chain takes a second and more on the larger ones of the first stages.
    "cpu": (
        *points(_maps(32, (64, 56), (128, 28), (1024, 14), (2048, 7)), ["contiguous"]),
        *points(_maps(32, (1024, 14)), ["channels_last"]),
        *points(_maps(32, (1024, 14)), LAYOUTS, ["shared"]),
    ),
    "cuda": (
        *points(_maps(256, (256, 56), (512, 28), (1024, 14), (2048, 7)), ["contiguous"]),
        *points(_maps(256, (1024, 14)), ["channels_last"]),
        *points(_maps(256, (1024, 14)), ["contiguous"], ["shared"]),
    ),
    "rehearsal": points([(2, 8, 14, 14)], ["contiguous"]),
}
HOST_CHAINS = ("",)
TINY = (1, 4, 2, 2)
SECONDS = 3.0
PEERS = ("torchvision", "timm")
# A block as large as the map or larger, odd and oblong maps, rows of bits longer than a word, volumes.
_MAPS = (
    (3, 8, 7, 7),
    (2, 5, 8, 8),
    (1, 9, 3, 2),
    (4, 16, 14, 14),
    (1, 3, 9, 70),
    (2, 24, 28, 28),
    (2, 3, 9, 8, 11),
)
CHECKS = points(_MAPS, LAYOUTS, ["", "shared"])


@dataclass(frozen=True)
class Setting:
    """Which blocks are dropped.

    Attributes:
        shape: of the mask, with one channel where all share it.
        block: its extent in each dimension of the map.
        anywhere: blocks are placed by their middle anywhere on the map, and cut off at the border.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]
    anywhere: bool

    @property
    def spatial(self) -> tuple[int, ...]:
        """The map."""
        return self.shape[2:]

    @property
    def gamma(self) -> float:
        """The probability of a block at each place, the paper's."""
        return _drop_block_rate.gamma_of(P, False, self.spatial, self.block, self.anywhere)

    @property
    def places(self) -> tuple[int, ...]:
        """Samples, channels, and where blocks may be."""
        return *self.shape[:2], *_drop_block_rate.seed_places(self.spatial, self.block, self.anywhere)

    @property
    def beside(self) -> tuple[list[int], list[int]]:
        """What windows of blocks see beyond the map and beyond the places, as ``F.pad`` has it."""
        map_padding: list[int] = []
        place_padding: list[int] = []
        for length in reversed(self.block):
            before = length // 2 if self.anywhere else 0
            behind = length - 1 - before if self.anywhere else 0
            map_padding += [before, behind]
            place_padding += [length - 1 - before, length - 1 - behind]
        return map_padding, place_padding


def setting_of(case: Case) -> Setting:
    """What a case drops."""
    samples, channels, *spatial = case.shape
    shared = case.chain == "shared"
    block = (min(BLOCK, *spatial),) * len(spatial)
    return Setting((samples, 1 if shared else channels, *spatial), block, anywhere=shared)


def bytes_moved(elements: int, element: int) -> dict[str, int]:
    """Minimum traffic in bytes: the input or its gradient read, the other written, once a direction.

    The mask costs nothing, since it comes from the random stream. The scale, which is the count's of a finished mask,
    needs no second pass over the input either.

    Args:
        elements: of the input.
        element: bytes of each.
    """
    passes = 2 * elements * element
    return {FORWARD: passes, BACKWARD: passes, BOTH: 2 * passes}


def make_problem(case: Case, device: torch.device, parameter_dtype: torch.dtype | None = None) -> Problem:
    """DropBlock of random maps, with blocks of 7 x 7 at a rate of 0.1; there are no parameters."""
    setting = setting_of(case)
    random = drawer(case, device)
    arguments = {"input": random(case.dtype, *case.shape, scale=1.5, shift=0.3).requires_grad_()}
    grad_output = without_zeros(random(case.dtype, *case.shape))
    shared = case.chain == "shared"
    drop_block = functional.drop_block2d if len(case.shape) == 4 else functional.drop_block3d

    def fastreg_function(input: torch.Tensor) -> torch.Tensor:
        seeds = "anywhere" if setting.anywhere else "valid"
        return drop_block(input, P, BLOCK, seeds=seeds, shared=shared)

    def exact(kept: torch.Tensor) -> Iterable[Exact]:
        return exact_results(arguments, grad_output, kept, kept.numel() / max(1, int(kept.sum())))

    def truth() -> Iterable[Exact]:
        threshold = round(setting.gamma * _units.LANES)
        seed = seed_drawn(device)
        return exact(formula.keep(seed, setting.shape, setting.block, threshold, None, setting.anywhere))

    def peer_truth(results: Results) -> Iterable[Exact]:
        kept = results["grad_input"][:, : setting.shape[1]] != 0
        check_mask(kept, setting)
        return exact(kept)

    return Problem(
        op=case.op,
        arguments=arguments,
        grad_output=grad_output,
        bytes_moved=bytes_moved(grad_output.numel(), case.dtype.itemsize),
        torch_function=_torch_function(setting),
        fastreg_function=fastreg_function,
        peers={"torchvision": _torchvision(case), "timm": _timm(case)},
        truth=truth,
        left_out=left_out(case.op, arguments["input"], passes=4),
        peer_truth=peer_truth,
    )


def check_mask(kept: torch.Tensor, setting: Setting) -> None:
    """Whether a mask drops whole blocks, and the share that is expected of the rate.

    Raises:
        Implausible: it does not.
    """
    map_padding, place_padding = setting.beside
    whole = F.pad(~kept, map_padding, value=True)
    for dimension, length in enumerate(setting.block, start=2):
        whole = whole.unfold(dimension, length, 1).all(dim=-1)
    covered = F.pad(whole, place_padding, value=False)
    for dimension, length in enumerate(setting.block, start=2):
        covered = covered.unfold(dimension, length, 1).any(dim=-1)
    if not torch.equal(covered, ~kept):
        raise Implausible("what is dropped is not made of whole blocks")
    share = _drop_block_rate.dropped_share(setting.gamma, setting.spatial, setting.block, setting.anywhere)
    # Positions further apart than a block are independent: the variance of a map's share is at most this.
    reach = math.prod(2 * length - 1 for length in setting.block)
    variance = share * (1 - share) * min(1.0, reach / math.prod(setting.spatial))
    check_share(kept, share, math.sqrt(variance / math.prod(setting.shape[:2])))


def _torch_function(setting: Setting) -> Function:
    """The paper's algorithm in torch's operations: blocks grown with max pooling, the scale by the count."""
    gamma, places, block = setting.gamma, setting.places, setting.block
    _, padding = setting.beside
    pool = F.max_pool2d if len(block) == 2 else F.max_pool3d

    def function(input: torch.Tensor) -> torch.Tensor:
        seeds = input.new_empty(places).bernoulli_(gamma)
        kept = 1 - pool(F.pad(seeds, padding), block, stride=1)
        return input * kept * (kept.numel() / kept.sum(dtype=torch.float32))

    return function


def _torchvision(case: Case) -> Function | str:
    if case.chain == "shared":
        return "torchvision has a mask for each channel"
    try:
        ops = importlib.import_module("torchvision.ops")
    except ImportError as error:
        return f"{error}: pip install torchvision"
    drop_block = ops.drop_block2d if len(case.shape) == 4 else ops.drop_block3d
    return lambda input: drop_block(input, P, BLOCK)


def _timm(case: Case) -> Function | str:
    if case.chain != "shared" or len(case.shape) != 4:
        return "timm cuts blocks off at the border of a map of two dimensions: compared where channels share a mask"
    try:
        layers = importlib.import_module("timm.layers")
    except ImportError as error:
        return f"{error}: pip install timm"
    return lambda input: layers.drop_block_2d(input, P, BLOCK)
