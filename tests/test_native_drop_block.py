"""DropBlock's CPU kernels: every instruction set and number of threads, rows of all widths, and the doors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastreg.backends.reference import drop_block as reference
from instruction_sets import LEVELS, has, kernels_of

pytestmark = pytest.mark.only(backend="native", device="cpu")

each_level = pytest.mark.parametrize("level", [level for level in LEVELS if has(level)])
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
each_element = pytest.mark.parametrize("element", [F32, BF16, F16, F64], ids=str)
SEED = torch.tensor(0x7EDCBA9876543210)


def native(name: str) -> Any:
    return getattr(torch.ops.fastreg_native, name).default


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make(
    shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", offset: int = 0
) -> torch.Tensor:
    """Random numbers, a NaN and an infinity among them; the first element is ``offset`` elements off its storage."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    order = [0, *range(2, len(shape)), 1] if layout == "channels_last" else list(range(len(shape)))
    flat = torch.randn(math.prod(shape) + offset, generator=generator).to(dtype)[offset:]
    if flat.numel() > 2:
        flat[flat.numel() // 2] = math.nan
        flat[flat.numel() // 3] = -math.inf
    stored = flat.view([shape[dimension] for dimension in order])
    return stored.permute([order.index(dimension) for dimension in range(len(shape))])


def check_equal(given: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=0, atol=0, equal_nan=True)


# --- masks ------------------------------------------------------------------------------------------------

# Rows of a byte or less, of whole bytes, of a word and beyond; blocks from one position to all of them.
MASKS = [
    ((2, 3, 1, 1), (1, 1)),
    ((3, 67, 7, 7), (7, 7)),
    ((3, 67, 7, 7), (3, 3)),
    ((2, 33, 14, 14), (7, 7)),
    ((2, 9, 28, 28), (7, 5)),
    ((2, 5, 56, 56), (7, 7)),
    ((1, 3, 5, 57), (2, 9)),
    ((1, 3, 5, 64), (5, 64)),
    ((1, 2, 9, 65), (1, 33)),
    ((1, 2, 33, 200), (7, 70)),
    ((1, 1, 140, 141), (9, 3)),
    ((2, 3, 4, 6, 9), (2, 3, 5)),
    ((1, 2, 9, 5, 70), (9, 1, 7)),
    ((0, 3, 4, 4), (2, 2)),
    ((2, 3, 0, 4), (1, 2)),
]


@each_level
@pytest.mark.parametrize("anywhere", [False, True], ids=["inside", "anywhere"])
@pytest.mark.parametrize(("shape", "block_size"), MASKS, ids=str)
def test_every_instruction_set_draws_the_mask(
    shape: tuple[int, ...], block_size: tuple[int, ...], anywhere: bool, level: str
) -> None:
    # Few seeds, as many as there are rows, most places, none and all.
    for rate in (0.003, 0.03, 0.7, 0.0, 1.0):
        threshold = round(rate * 2**32)
        expected = reference.drop_block_mask(SEED, shape, block_size, threshold, None, anywhere)
        with kernels_of(level):
            for given in ((threshold, None), (0, torch.tensor(threshold))):
                bits, counts = native("drop_block_mask")(SEED, shape, block_size, *given, anywhere)
                check_equal(bits, expected[0])
                check_equal(counts, expected[1])


@pytest.mark.parametrize("rate", [0.003, 0.5])
@pytest.mark.parametrize(
    ("shape", "block_size"), [((3, 301, 9, 11), (4, 3)), ((5, 1, 150, 150), (7, 7))], ids=str
)
def test_masks_do_not_depend_on_threads(
    shape: tuple[int, ...], block_size: tuple[int, ...], rate: float
) -> None:
    expected = reference.drop_block_mask(SEED, shape, block_size, round(rate * 2**32), None, True)
    for count in (1, 2, 3):
        with threads(count):
            bits, counts = native("drop_block_mask")(SEED, shape, block_size, round(rate * 2**32), None, True)
        check_equal(bits, expected[0])
        check_equal(counts, expected[1])


# --- applying ---------------------------------------------------------------------------------------------

APPLIED = [
    (1, 1, 1, 1),
    (3, 37, 7, 7),
    (2, 16, 14, 14),
    (2, 17, 28, 28),
    (2, 3, 56, 56),
    (2, 70, 3, 24),
    (3, 5, 2, 65),
    (2, 33, 6, 37),
    (2, 12, 3, 4, 5),
    (0, 3, 4, 4),
    (2, 0, 4, 4),
]


@each_level
@each_element
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_instruction_set_applies_it(layout: str, element: torch.dtype, level: str) -> None:
    for shape in APPLIED:
        check_applying(shape, layout, element, level)


def check_applying(shape: Sequence[int], layout: str, element: torch.dtype, level: str) -> None:
    blocks = tuple(min(3, size) for size in shape[2:])
    scales = (torch.tensor(1.25, dtype=F64), torch.linspace(1.0, 2.0, shape[0], dtype=F64))
    for channels, scale, offset in ((shape[1], scales[0], 1), (1, scales[1], 0), (shape[1], scales[1], 0)):
        given = make(shape, element, layout, offset)
        mask_shape = (shape[0], channels, *shape[2:])
        bits, _ = reference.drop_block_mask(SEED, mask_shape, blocks, 2**29, None, False)
        expected = reference.drop_block_apply(given, bits, scale)
        with kernels_of(level):
            output = native("drop_block_apply")(given, bits, scale)
            assert output.stride() == given.stride()
            check_equal(output, expected)
            native("drop_block_inplace")(given, bits, scale)
            check_equal(given, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shared", [False, True])
# Two tensors that one cuts into several pieces of work, and one of 12 MiB, which goes past the caches.
@pytest.mark.parametrize("shape", [(3, 80, 27, 29), (2, 48, 64, 64), (3, 128, 93, 91)], ids=str)
def test_applying_does_not_depend_on_threads(shape: tuple[int, ...], shared: bool, layout: str) -> None:
    given = make(shape, F32, layout)
    mask_shape = (shape[0], 1 if shared else shape[1], *shape[2:])
    bits, _ = native("drop_block_mask")(SEED, mask_shape, (5, 5), 2**24, None, False)
    scale = torch.linspace(1.0, 2.0, shape[0], dtype=F64)
    expected = reference.drop_block_apply(given, bits, scale)
    for count in (1, 2, 3):
        with threads(count):
            check_equal(native("drop_block_apply")(given, bits, scale), expected)


# --- doors ------------------------------------------------------------------------------------------------

MASK: dict[str, Any] = {
    "seed": SEED,
    "shape": (2, 3, 8, 9),
    "block_size": (3, 3),
    "threshold": 5,
    "dynamic_threshold": None,
    "anywhere": False,
}

MASK_REFUSED = {
    "a seed of another type": ({"seed": torch.tensor(3.0)}, "seed must be one int64"),
    "two seeds": ({"seed": torch.tensor([1, 2])}, "seed must be one int64"),
    "a sequence": ({"shape": (2, 3, 8), "block_size": (3,)}, "two or three spatial sizes, but has 3"),
    "a negative size": ({"shape": (2, -3, 8, 9)}, "must not have negative sizes, but has -3"),
    "blocks of other dimensions": ({"block_size": (3, 3, 3)}, "block_size must have 2 sizes, but has 3"),
    "a block beyond": ({"block_size": (9, 3)}, "between 1 and the size of its dimension, 8, but is 9"),
    "a block of nothing": ({"block_size": (3, 0)}, "between 1 and the size of its dimension, 9, but is 0"),
    "a negative threshold": ({"threshold": -1}, "threshold must be between 0 and 4294967296, but is -1"),
    "a large threshold": ({"threshold": 2**32 + 1}, "threshold must be between 0 and"),
    "a real threshold": ({"dynamic_threshold": torch.tensor(0.5)}, "dynamic_threshold must be one int64"),
}


@pytest.mark.parametrize("name", MASK_REFUSED)
def test_the_mask_refuses(name: str) -> None:
    changes, message = MASK_REFUSED[name]
    with pytest.raises(RuntimeError, match=f"fastreg_native::drop_block_mask: .*{message}"):
        native("drop_block_mask")(**{**MASK, **changes})


APPLY: dict[str, Any] = {
    "input": torch.ones(2, 3, 8, 9),
    "bits": torch.full((2, 3, 8, 2), 255, dtype=torch.uint8),
    "scale": torch.ones(1, dtype=F64),
}

APPLY_REFUSED = {
    "a sequence": ({"input": torch.ones(2, 3, 8)}, "input must have 4 or 5 dimensions, but has 3"),
    "integers": ({"input": torch.ones(2, 3, 8, 9, dtype=torch.int64)}, "input must be float32"),
    "columns": ({"input": torch.ones(2, 3, 9, 8).transpose(2, 3)}, "input cannot be viewed"),
    "a slice": ({"input": torch.ones(2, 4, 8, 9)[:, :3]}, "input must be contiguous or channels_last"),
    "bits of other channels": (
        {"bits": torch.ones(2, 2, 8, 2, dtype=torch.uint8)},
        "bits must be contiguous uint8",
    ),
    "bits of long rows": ({"bits": torch.ones(2, 3, 8, 3, dtype=torch.uint8)}, "for 2 bytes a row"),
    "bits of integers": (
        {"bits": torch.ones(2, 3, 8, 2, dtype=torch.int32)},
        "bits must be contiguous uint8",
    ),
    "scattered bits": (
        {"bits": torch.ones(2, 3, 8, 4, dtype=torch.uint8)[..., ::2]},
        "bits must be contiguous uint8",
    ),
    "many scales": ({"scale": torch.ones(3, dtype=F64)}, "scale must have 2 elements, but has 3"),
    "a scale of fp32": ({"scale": torch.ones(1)}, "scale must be float64"),
}


@pytest.mark.parametrize("name", APPLY_REFUSED)
@pytest.mark.parametrize("op", ["drop_block_apply", "drop_block_inplace"])
def test_applying_refuses(op: str, name: str) -> None:
    changes, message = APPLY_REFUSED[name]
    with pytest.raises(RuntimeError, match=f"fastreg_native::{op}: .*{message}"):
        native(op)(**{**APPLY, **changes})
