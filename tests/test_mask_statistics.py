"""The random stream and what is drawn from it: known answers, rates, correlations, and DropBlock's closed form.

Every backend draws the same masks (test_dropout.py), so one fast one serves for the statistics. Seeds are fixed: a test
that passes always passes. Limits are five standard deviations, or a chance below one in a million.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from drop_blocks import covering_seeds, expected_share
from fastreg import functional as F
from fastreg.backends.reference import _philox
from masks import block, philox

fast_backend = pytest.mark.only(backend="native")
ELEMENTS = 2**20

# Published with the reference implementation, Random123: counter, key, output.
KNOWN_ANSWERS = (
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def signed(value: int) -> int:
    """64 bits as torch has them."""
    return (value + 2**63) % 2**64 - 2**63


@pytest.mark.backend_independent
@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]) -> None:
    assert philox(key, counter) == output  # type: ignore[arg-type]
    seed = torch.tensor(signed(key[1] << 32 | key[0]))
    words = _philox.philox(seed, *(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in words) == output


@pytest.mark.backend_independent
def test_blocks_are_counted_in_64_bits() -> None:
    for seed, index in ((3, 2**32), (-1, 2**40 + 5), (2**62, 2**61 - 1)):
        words = _philox.philox(
            torch.tensor(seed), torch.tensor(index & 0xFFFFFFFF), torch.tensor(index >> 32), 0, 0
        )
        assert tuple(int(word) for word in words) == block(seed, index)
        assert block(seed, index) != block(seed, index & 0xFFFFFFFF)


def signs(mask: torch.Tensor, p: float) -> torch.Tensor:
    """Kept and dropped as numbers of mean 0 and variance 1."""
    return ((mask != 0).double() - (1 - p)) / math.sqrt(p * (1 - p))


def check_uncorrelated(one: torch.Tensor, other: torch.Tensor, what: str) -> None:
    correlation = float((one * other).mean())
    assert abs(correlation) < 5 / math.sqrt(one.numel()), f"{what}: {correlation}"


# --- dropout ---


@fast_backend
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rates_are_within_the_binomial_interval(p: float, device: str) -> None:
    shapes = ((ELEMENTS,), (1024, 1024), (16, 64, 32, 32), (1000, 1001))
    for place, shape in enumerate(shapes):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            input = torch.ones(shape, dtype=dtype, device=device)
            dropped = int((F.dropout(input, p, seed=100 * place + dtype.itemsize) == 0).sum())
            rate = round(p * 2**16) / 2**16
            deviation = math.sqrt(rate * (1 - rate) * input.numel())
            assert abs(dropped - rate * input.numel()) < 5 * deviation, (shape, dtype)
    for function, shape in ((F.dropout2d, (512, 512, 2, 2)), (F.drop_path, (2**17, 3))):
        units = function(torch.ones(shape, device=device), p, seed=1).flatten(2 if len(shape) == 4 else 1)[
            ..., 0
        ]
        dropped = int((units == 0).sum())
        assert abs(dropped - p * units.numel()) < 5 * math.sqrt(p * (1 - p) * units.numel()), shape


@fast_backend
def test_the_mean_stays_for_the_rate_that_was_rounded_to(device: str) -> None:
    """The scale is that of round(p * 65536), so no bias is left however many masks are averaged."""
    input = torch.ones(ELEMENTS, device=device)
    for p in (1e-5, 0.3, 0.9999):
        threshold = round(p * 2**16)
        output = F.dropout(input, p, seed=3)
        assert float(output.max()) == pytest.approx(2**16 / (2**16 - threshold), rel=2**-23)


@fast_backend
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_lag_is_correlated(p: float, device: str) -> None:
    columns = 1000
    for seed in (0, 12345, 2**40):
        mask = signs(F.dropout(torch.ones(1048, columns, device=device), p, seed=seed), p).flatten()
        for lag in (*range(1, 33), 64, 128, 256, 512, columns, 2 * columns, 32 * columns, 2**16):
            check_uncorrelated(mask[:-lag], mask[lag:], f"lag {lag} of seed {seed}")
        units = F.dropout2d(torch.ones(1024, 512, 1, 1, device=device), p, seed=seed)
        channels = signs(units, p).flatten()
        for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128, 512):
            check_uncorrelated(channels[:-lag], channels[lag:], f"channels at lag {lag} of seed {seed}")


@fast_backend
def test_calls_layers_samples_and_seeds_are_uncorrelated(device: str) -> None:
    input = torch.ones(64, 4096, device=device)
    torch.manual_seed(0)
    drawn = [signs(F.dropout(input, 0.5), 0.5) for _ in range(4)]
    # Neighbours differ in one bit of the key; ranks are seeded so.
    drawn += [signs(F.dropout(input, 0.5, seed=seed), 0.5) for seed in (0, 1, 2, 3, 2**32, 2**32 + 1, -1)]
    for rank in (0, 1, 2):
        torch.manual_seed(100 + rank)
        drawn.append(signs(F.dropout(input, 0.5), 0.5))
    for place, one in enumerate(drawn):
        for other in drawn[:place]:
            check_uncorrelated(one, other, "two masks")
    for mask in drawn[:3]:
        for one, other in pairwise(mask):
            check_uncorrelated(one, other, "two samples")


@fast_backend
def test_every_lane_of_a_block_is_as_likely(device: str) -> None:
    """Also among the eight elements that share a call of Philox, whose words are halves."""
    dropped = (F.dropout(torch.ones(2**21, device=device), 0.25, seed=5) == 0).reshape(-1, 8)
    counts = dropped.sum(0).double().cpu()
    deviation = math.sqrt(0.25 * 0.75 * dropped.shape[0])
    assert ((counts - 0.25 * dropped.shape[0]).abs() < 5 * deviation).all()
    pairs = signs(~dropped, 0.25).cpu()
    correlation = pairs.T @ pairs / pairs.shape[0] - torch.eye(8, dtype=torch.float64)
    diagonal = torch.eye(8, dtype=torch.bool)
    assert correlation[~diagonal].abs().max() < 5 / math.sqrt(pairs.shape[0])


# --- DropBlock ---

SETTINGS = ((56, 7), (14, 7), (7, 7), (7, 3), (14, 4))


@fast_backend
@pytest.mark.parametrize(("size", "length"), SETTINGS)
@pytest.mark.parametrize("seeds", ["valid", "anywhere"])
def test_exact_gamma_realises_the_rate(size: int, length: int, seeds: str, device: str) -> None:
    """Within the interval that the planes' own scatter gives, for every rate: planes are independent, positions not."""
    planes = 2**21 // size**2
    for p in (0.05, 0.1, 0.25, 0.5):
        mask = F.drop_block_mask2d(
            (planes // 64, 64, size, size), p, length, gamma="exact", seeds=seeds, seed=17, device=device
        )
        shares = 1.0 - mask.flatten(0, 1).flatten(1).double().mean(1)
        error = float(shares.mean()) - p
        assert abs(error) < 4 * float(shares.std()) / math.sqrt(shares.numel()), (p, error)
        # A tensor draws the same, but for what lies between two entries of its table.
        other = F.drop_block_mask2d(
            mask.shape,
            torch.tensor(p, dtype=torch.float64, device=device),
            length,
            gamma="exact",
            seeds=seeds,
            seed=17,
        )
        assert (other != mask).double().mean() < 1e-4


@fast_backend
@pytest.mark.parametrize(("size", "length"), SETTINGS)
@pytest.mark.parametrize("seeds", ["valid", "anywhere"])
def test_every_position_is_dropped_as_often_as_the_closed_form_says(
    size: int, length: int, seeds: str, device: str
) -> None:
    """A chi-square of one position at a time: the largest of all, and their mean, for the paper's gamma."""
    planes, p = (4096 if size == 56 else 32768), 0.2
    mask = F.drop_block_mask2d((planes // 64, 64, size, size), p, length, seeds=seeds, seed=23, device=device)
    dropped = planes - mask.flatten(0, 1).sum(0).double().cpu()
    numbers = covering_seeds((size, size), (length, length), seeds == "anywhere")
    gamma = min(1.0, p * size**2 / (length**2 * (size - length + 1) ** 2))
    expected = 1.0 - (1.0 - gamma) ** numbers
    squares = (dropped - planes * expected).square() / (planes * expected * (1 - expected))
    assert squares.max() < 5.5**2
    # Neighbours are correlated, so that a map has about as many independent positions as it has blocks.
    independent = max(1.0, (size / length) ** 2)
    assert abs(float(squares.mean()) - 1) < 6 * math.sqrt(2 / independent)
    share = float(dropped.mean()) / planes
    assert share == pytest.approx(expected_share(gamma, numbers), rel=0.05)


@fast_backend
def test_blocks_of_channels_and_samples_are_uncorrelated(device: str) -> None:
    mask = F.drop_block_mask2d((32, 64, 28, 28), 0.3, 5, gamma="exact", seed=29, device=device).double()
    planes = mask.flatten(0, 1).flatten(1)
    # Positions near the border are dropped less often, in every plane.
    planes = planes - planes.mean(0)
    scale = float(planes.square().mean())
    # The scatter of a plane's product with its neighbour gives the interval, as its positions are correlated.
    for lag in (1, 2, 64, 65, 128):
        products = (planes[:-lag] * planes[lag:]).mean(1) / scale
        assert abs(float(products.mean())) < 5 * float(products.std()) / math.sqrt(products.numel()), lag
