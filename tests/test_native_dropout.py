"""Dropout's CPU kernels: every instruction set and number of threads, units of all lengths, and the doors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastreg._units import BATCH, CHANNEL, ELEMENT, SAMPLE, lanes
from fastreg.backends.reference import dropout as reference
from instruction_sets import LEVELS, has, kernels_of

pytestmark = pytest.mark.only(backend="native", device="cpu")

each_level = pytest.mark.parametrize("level", [level for level in LEVELS if has(level)])
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
each_element = pytest.mark.parametrize("element", [F32, BF16, F16, F64], ids=str)
SEED = torch.tensor(-0x123456789ABCDEF)

TOLERANCES = {F32: 1e-6, BF16: 2**-7, F16: 2**-10, F64: 1e-15}
"""Of sums of two rounded terms, which processors that fuse multiplication and addition round once."""


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
    order = list(range(len(shape)))
    if layout == "channels_last":
        order = [0, *range(2, len(shape)), 1]
    elif layout == "reversed":
        order.reverse()
    flat = torch.randn(math.prod(shape) + offset, generator=generator).to(dtype)[offset:]
    if flat.numel() > 2:
        flat[flat.numel() // 2] = math.nan
        flat[flat.numel() // 3] = -math.inf
    stored = flat.view([shape[dimension] for dimension in order])
    return stored.permute([order.index(dimension) for dimension in range(len(shape))])


def like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Other random numbers, laid out as ``tensor``."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(tensor.shape, generator=generator).to(dtype)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype).copy_(values)


def mask(unit: int, p: float = 0.3, dynamic: bool = False, rescale: bool = True) -> tuple[Any, ...]:
    threshold = round(p * lanes(unit))
    return (
        (SEED, 0, torch.tensor(threshold), unit, rescale)
        if dynamic
        else (SEED, threshold, None, unit, rescale)
    )


def check_equal(given: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=0, atol=0, equal_nan=True)


# --- masks ------------------------------------------------------------------------------------------------

# Units of one element, shorter and longer than a tile of masks, and of every remainder by a vector.
UNITS = {
    "no dimensions": (ELEMENT, (), "contiguous"),
    "one element": (ELEMENT, (1,), "contiguous"),
    "none": (ELEMENT, (3, 0, 2), "contiguous"),
    "a part of a vector": (ELEMENT, (3,), "contiguous"),
    "a tile and a rest": (ELEMENT, (4099,), "contiguous"),
    "columns": (ELEMENT, (3, 5, 7, 11), "reversed"),
    "channels last": (ELEMENT, (2, 9, 7, 5), "channels_last"),
    "several pieces": (ELEMENT, (5, 131, 127), "contiguous"),
    "channels of one element": (CHANNEL, (37, 211), "contiguous"),
    "channels of two elements": (CHANNEL, (5, 301, 2), "contiguous"),
    "planes of 7 by 7": (CHANNEL, (3, 67, 7, 7), "contiguous"),
    "planes of 255 elements": (CHANNEL, (2, 41, 255), "contiguous"),
    "planes of 256 elements": (CHANNEL, (2, 41, 16, 16), "contiguous"),
    "planes of 17 by 19": (CHANNEL, (2, 41, 17, 19), "contiguous"),
    "planes of five dimensions": (CHANNEL, (2, 5, 3, 4, 5), "contiguous"),
    "rows of three channels": (CHANNEL, (3, 3, 41, 13), "channels_last"),
    "rows of 64 channels": (CHANNEL, (2, 64, 11, 13), "channels_last"),
    "rows of 515 channels": (CHANNEL, (3, 515, 3, 7), "channels_last"),
    "samples": (SAMPLE, (21, 33, 7), "contiguous"),
    "samples of one element": (SAMPLE, (1001,), "contiguous"),
    "samples with the channels last": (SAMPLE, (9, 3, 5, 7), "channels_last"),
    "the batch": (BATCH, (4, 5, 6), "reversed"),
}


@each_level
@each_element
def test_every_instruction_set_draws_the_mask(element: torch.dtype, level: str) -> None:
    for unit, shape, layout in UNITS.values():
        check_masks(unit, shape, layout, element, level)


def check_masks(unit: int, shape: Sequence[int], layout: str, element: torch.dtype, level: str) -> None:
    given = make(shape, element, layout)
    for p, dynamic, rescale in ((0.3, False, True), (0.9, True, False)):
        arguments = mask(unit, p, dynamic, rescale)
        expected = reference.dropout_fwd(given, None, None, None, *arguments)
        with kernels_of(level):
            output = native("dropout_fwd")(given, None, None, None, *arguments)
            assert output.stride() == given.stride()
            check_equal(output, expected)
            number = reference.DTYPES.index(element)
            gradient, empty = native("dropout_bwd")(
                given, None, None, None, *arguments, number, [True, False]
            )
            check_equal(gradient, expected)
            assert empty.shape == (0,)
            written = torch.empty_strided(given.shape, given.stride(), dtype=element).copy_(given)
            native("dropout_inplace")(written, *arguments)
            check_equal(written, expected)


@each_level
@pytest.mark.parametrize("unit", [ELEMENT, CHANNEL, SAMPLE, BATCH])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_and_everything_is_dropped(p: float, unit: int, level: str) -> None:
    given = make((6, 7, 5), F32)
    residual = like(given, F32)
    with kernels_of(level):
        for dynamic in (False, True):
            alone = native("dropout_fwd")(given, None, None, None, *mask(unit, p, dynamic))
            added = native("dropout_fwd")(given, residual, None, None, *mask(unit, p, dynamic))
            check_equal(alone, torch.zeros_like(given) if p == 1.0 else given)
            check_equal(added, residual if p == 1.0 else given + residual)
        check_equal(native("dropout_fwd")(given, None, None, None, None, 0, None, unit, True), given)


@each_level
@each_element
@pytest.mark.parametrize("unit", [ELEMENT, CHANNEL, SAMPLE])
def test_tensors_off_the_vectors(unit: int, element: torch.dtype, level: str) -> None:
    given = make((3, 41, 29), element, offset=1)
    expected = reference.dropout_fwd(given, None, None, None, *mask(unit))
    with kernels_of(level):
        check_equal(native("dropout_fwd")(given, None, None, None, *mask(unit)), expected)
        native("dropout_inplace")(given, *mask(unit))
        check_equal(given, expected)


# --- what is added and multiplied -------------------------------------------------------------------------

MIXES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F64, F64)]
SHAPES = [(5, 33, 65), (2, 3, 1), (300, 7), (3, 1027)]


@each_level
@pytest.mark.parametrize(("element", "wide"), MIXES, ids=str)
@pytest.mark.parametrize("unit", [ELEMENT, CHANNEL, SAMPLE])
def test_residuals_and_scales(unit: int, element: torch.dtype, wide: torch.dtype, level: str) -> None:
    scale_dtype = F64 if element == F64 else BF16
    for shape in SHAPES:
        given = make(shape, element)
        residual = like(given, wide)
        row_scale = make(shape[:-1], scale_dtype).nan_to_num(2.0, neginf=0.5)
        layer_scale = make(shape[-1:], wide).nan_to_num(2.0, neginf=0.5)
        for scales in ((None, None), (row_scale, None), (row_scale, layer_scale), (None, layer_scale)):
            expected = reference.dropout_fwd(given, residual, *scales, *mask(unit))
            with kernels_of(level):
                output = native("dropout_fwd")(given, residual, *scales, *mask(unit))
            torch.testing.assert_close(
                output, expected, rtol=TOLERANCES[wide], atol=4 * TOLERANCES[element], equal_nan=True
            )


@each_level
@pytest.mark.parametrize(("element", "wide"), MIXES, ids=str)
@pytest.mark.parametrize("unit", [ELEMENT, CHANNEL, SAMPLE])
@pytest.mark.parametrize("shape", [(40, 9, 65), (700, 3), (2, 9001), (0, 5)], ids=str)
def test_gradients_with_a_layer_scale(
    shape: tuple[int, ...], unit: int, element: torch.dtype, wide: torch.dtype, level: str
) -> None:
    given = make(shape, element).nan_to_num(1.5, neginf=-1.5)
    grad_output = like(given, wide)
    row_scale = torch.linspace(0.5, 2.0, math.prod(shape[:-1])).reshape(shape[:-1]).to(wide)
    layer_scale = torch.linspace(0.5, 2.0, shape[-1]).to(element)
    number = reference.DTYPES.index(element)
    arguments = (grad_output, given, row_scale, layer_scale, *mask(unit), number)
    expected, _ = reference.dropout_bwd(*arguments, [True, False])
    terms = reference.scaled(grad_output, row_scale, None, *mask(unit)).double() * given.double()
    total, absolute = (t.reshape(-1, shape[-1]).sum(dim=0) for t in (terms, terms.abs()))
    with kernels_of(level):
        grad_input, grad_layer_scale = native("dropout_bwd")(*arguments, [True, True])
        alone, _ = native("dropout_bwd")(*arguments, [True, False])
        _, layer_scale_alone = native("dropout_bwd")(*arguments, [False, True])
    check_equal(grad_input, alone)
    check_equal(grad_layer_scale, layer_scale_alone)
    torch.testing.assert_close(grad_input, expected, rtol=TOLERANCES[element], atol=4 * TOLERANCES[element])
    # The budget of TESTING.md: a rounding of the result, and fp32's of the terms.
    rounding = 0.0 if element in (F32, F64) else 0.51 * torch.finfo(element).eps
    accumulator = torch.finfo(torch.promote_types(element, F32))
    limit = rounding * total.abs() + 8 * accumulator.eps * absolute + torch.finfo(element).tiny
    assert grad_layer_scale.dtype == element
    assert bool(((grad_layer_scale.double() - total).abs() <= limit).all())


@each_level
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("unit", [ELEMENT, CHANNEL, SAMPLE])
def test_a_layer_scale_learns_nothing_of_what_is_dropped(unit: int, poison: float, level: str) -> None:
    given = make((40, 9, 65), F32).nan_to_num(1.5, neginf=-1.5)
    kept = native("dropout_fwd")(torch.ones_like(given), None, None, None, *mask(unit)) != 0
    layer_scale, poisoned = torch.linspace(0.5, 2.0, 65), torch.where(kept, given, poison)
    arguments = (None, layer_scale, *mask(unit), 0, [True, True])
    with kernels_of(level):
        clean = native("dropout_bwd")(like(given, F32), given, *arguments)
        found = native("dropout_bwd")(like(given, F32), poisoned, *arguments)
    for gradient, expected in zip(found, clean, strict=True):
        assert bool(gradient.isfinite().all())
        check_equal(gradient, expected)


# --- threads and large outputs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "shape", "layout"),
    [
        (ELEMENT, (3, 65, 1025), "contiguous"),
        (CHANNEL, (3, 1001, 7, 7), "contiguous"),
        (CHANNEL, (5, 33, 37, 41), "channels_last"),
        (SAMPLE, (7, 99, 301), "contiguous"),
    ],
)
def test_bits_do_not_depend_on_threads(unit: int, shape: tuple[int, ...], layout: str) -> None:
    given = make(shape, F32, layout).nan_to_num(1.5, neginf=-1.5)
    residual = like(given, F32)
    layer_scale = torch.linspace(0.5, 2.0, shape[-1])
    results = []
    for count in (1, 2, 3):
        with threads(count):
            result = [native("dropout_fwd")(given, residual, None, None, *mask(unit))]
            if layout == "contiguous":
                arguments = (residual, given, None, layer_scale, *mask(unit), 0, [True, True])
                result += native("dropout_bwd")(*arguments)
        results.append(result)
    for others in results[1:]:
        for result, other in zip(results[0], others, strict=True):
            check_equal(result, other)


# Of 12 MiB or more: past the caches. Odd lengths of units begin between two cache lines.
@pytest.mark.parametrize(
    ("unit", "shape", "layout", "element"),
    [
        (ELEMENT, (3200001,), "contiguous", F32),
        (CHANNEL, (3, 601, 43, 43), "contiguous", F32),
        (CHANNEL, (2, 130, 110, 111), "channels_last", F32),
        (SAMPLE, (7, 1000, 907), "contiguous", BF16),
    ],
)
def test_large_outputs(unit: int, shape: tuple[int, ...], layout: str, element: torch.dtype) -> None:
    given = torch.ones(shape, dtype=element)
    if layout == "channels_last":
        given = given.contiguous(memory_format=torch.channels_last)
    output = native("dropout_fwd")(given, None, None, None, *mask(unit))
    assert output.nbytes >= 12 << 20
    check_equal(output, reference.dropout_fwd(given, None, None, None, *mask(unit)))


# --- doors ------------------------------------------------------------------------------------------------

GIVEN: dict[str, Any] = {
    "input": torch.ones(4, 6, 5),
    "residual": None,
    "row_scale": None,
    "layer_scale": None,
    "seed": SEED,
    "threshold": 5,
    "dynamic_threshold": None,
    "unit": ELEMENT,
    "rescale": True,
}

REFUSED = {
    "gaps": ({"input": torch.ones(4, 6, 10)[..., ::2]}, "input must fill its memory without gaps"),
    "overlaps": ({"input": torch.ones(4, 1, 5).expand(4, 6, 5)}, "input must fill its memory without gaps"),
    "integers": ({"input": torch.ones(4, 6, 5, dtype=torch.int32)}, "input must be float32"),
    "channels of permuted memory": (
        {"input": torch.ones(6, 4, 5).transpose(0, 1), "unit": CHANNEL},
        "contiguous or channels_last",
    ),
    "channels of a vector": ({"input": torch.ones(4), "unit": CHANNEL}, "at least 2 dimensions"),
    "samples within": (
        {"input": torch.ones(6, 4, 5).transpose(0, 1), "unit": SAMPLE},
        "the outermost in memory",
    ),
    "a sample of nothing": ({"input": torch.ones(()), "unit": SAMPLE}, "must have a dimension"),
    "no such unit": ({"unit": 4}, "unit must be 0 .* but is 4"),
    "a small residual": (
        {"residual": torch.ones(4, 6, 4)},
        "residual must have the shape, strides and device",
    ),
    "a permuted residual": (
        {"residual": torch.ones(6, 4, 5).transpose(0, 1)},
        "residual must have the shape, strides and device",
    ),
    "a narrow residual": ({"residual": torch.ones(4, 6, 5).half()}, "residual must have input's dtype"),
    "a long row_scale": ({"row_scale": torch.ones(5)}, "row_scale must have the first dimensions"),
    "a row_scale of elements beside a layer_scale": (
        {"row_scale": torch.ones(4, 6, 5), "layer_scale": torch.ones(5)},
        "row_scale must have the first dimensions of input's shape, without the last",
    ),
    "a row_scale of doubles": (
        {"row_scale": torch.ones(4).double()},
        "row_scale is float64 but input is float32",
    ),
    "a scattered row_scale": ({"row_scale": torch.ones(8)[::2]}, "row_scale must be contiguous"),
    "a short layer_scale": ({"layer_scale": torch.ones(4)}, "layer_scale must have 5 elements, but has 4"),
    "a layer_scale of columns": (
        {"input": torch.ones(6, 4, 5).transpose(0, 1), "layer_scale": torch.ones(5)},
        "input must be contiguous where layer_scale is given",
    ),
    "a seed of another type": ({"seed": torch.tensor(3, dtype=torch.int32)}, "seed must be one int64"),
    "two seeds": ({"seed": torch.tensor([1, 2])}, "seed must be one int64"),
    "a negative threshold": ({"threshold": -1}, "threshold must be between 0 and 65536, but is -1"),
    "a large threshold": ({"threshold": 2**16 + 1}, "threshold must be between 0 and 65536"),
    "a real threshold": ({"dynamic_threshold": torch.tensor(0.5)}, "dynamic_threshold must be one int64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_forward_refuses(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=f"fastreg_native::dropout_fwd: .*{message}"):
        native("dropout_fwd")(**{**GIVEN, **changes})
    inplace = {
        name: value for name, value in changes.items() if name in ("seed", "threshold", "unit", "input")
    }
    if inplace == changes:
        arguments = {name: GIVEN[name] for name in ("input", *list(GIVEN)[4:])}
        with pytest.raises(RuntimeError, match=f"fastreg_native::dropout_inplace: .*{message}"):
            native("dropout_inplace")(**{**arguments, **changes})


BACKWARD_REFUSED = {
    "no such dtype": ({"input_dtype": 4}, "input_dtype must be 0"),
    "a narrow gradient": ({"grad_output": torch.ones(4, 6, 5).half()}, "grad_output must be float32"),
    "no layer_scale": ({"layer_scale": None}, "the gradient of layer_scale, which was not given"),
    "no input": ({"input": None}, "for which input must be given"),
    "another input": ({"input": torch.ones(4, 6, 4)}, "input must have the shape, strides and device"),
    "an input of another dtype": ({"input": torch.ones(4, 6, 5).half()}, "input must be float32"),
}


@pytest.mark.parametrize("name", BACKWARD_REFUSED)
def test_backward_refuses(name: str) -> None:
    changes, message = BACKWARD_REFUSED[name]
    given = {name: value for name, value in GIVEN.items() if name != "residual"}
    given |= {
        "grad_output": torch.ones(4, 6, 5),
        "layer_scale": torch.ones(5),
        "input_dtype": 0,
        "output_mask": [True, True],
    }
    with pytest.raises(RuntimeError, match=f"fastreg_native::dropout_bwd: .*{message}"):
        native("dropout_bwd")(**{**given, **changes})
