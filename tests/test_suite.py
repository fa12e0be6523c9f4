"""The suite's own parts: the criterion, the covering choice, and that no backend is spared a size."""

from __future__ import annotations

import argparse
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from backend_under_test import BACKENDS, cases_for
from cases import CHANNEL_LAYOUTS, DATA, LAYOUTS, covering
from criterion import Exact, Rejected, budget, check
from group_norms import GROUP_NORM, INSTANCE_NORM
from specs import ROW_NORMS, SPECS
from suite import OpSpec, cases, same_bits, unwritten_memory_is_nan

pytestmark = pytest.mark.backend_independent

HALVES = [torch.bfloat16, torch.float16]


def exact_of(dtype: torch.dtype, elements: int = 4096) -> Exact:
    value = torch.randn(elements, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Exact(value, value.abs(), dtype)


@pytest.mark.parametrize("rounded_to", [*HALVES, torch.float32, torch.float64])
def test_a_rounded_exact_value_passes(rounded_to: torch.rounded_to) -> None:
    exact = exact_of(rounded_to)
    check("result", exact.value.to(rounded_to), exact)
    assert (budget(exact) > 0).all()


@pytest.mark.parametrize("rounded_to", [*HALVES, torch.float32, torch.float64])
def test_one_wrong_element_is_found_and_named(rounded_to: torch.rounded_to) -> None:
    exact = exact_of(rounded_to)
    for wrong in (
        exact.value[77] * (1 + 64 * torch.finfo(rounded_to).eps),
        torch.nan,
        torch.inf,
        0.0,
        -exact.value[77],
    ):
        result = exact.value.to(rounded_to, copy=True)
        result[77] = wrong
        with pytest.raises(Rejected, match=r"result: 1 of 4096 elements are off, the first at \(77,\)"):
            check("result", result, exact)


def test_dtype_and_shape_count() -> None:
    exact = exact_of(torch.bfloat16)
    with pytest.raises(Rejected, match=r"dtype torch\.float32, expected torch\.bfloat16"):
        check("result", exact.value.float(), exact)
    with pytest.raises(Rejected, match="shape"):
        check("result", exact.value.bfloat16()[:7], exact)


def test_beyond_the_range_infinity_is_right() -> None:
    exact = Exact(torch.tensor([1e5, -1e5], dtype=torch.float64), torch.tensor([1e5, 1e5]), torch.float16)
    check("result", torch.tensor([torch.inf, -torch.inf], dtype=torch.float16), exact)
    for wrong in (torch.tensor([torch.inf, torch.inf]), torch.tensor([torch.nan, -torch.inf])):
        with pytest.raises(Rejected):
            check("result", wrong.half(), exact)


def test_results_smaller_than_normal_numbers_are_rounded_on_their_grid() -> None:
    exact = Exact(torch.tensor([3.1e-7], dtype=torch.float64), torch.tensor([0.0]), torch.float16)
    check("result", exact.value.half(), exact)
    with pytest.raises(Rejected):
        check("result", exact.value.half() + 2**-24, exact)


@pytest.mark.parametrize("rounded_to", HALVES)
@pytest.mark.parametrize("direction", ["up", "down", "toward zero"])
def test_a_store_that_leans_is_found(rounded_to: torch.rounded_to, direction: str) -> None:
    """The right store's errors shifted by a third of an ulp one way, which no elementwise bound can see."""
    exact = exact_of(rounded_to)
    ulp = torch.finfo(rounded_to).eps * torch.exp2(torch.floor(torch.log2(exact.value.abs())))
    sign = {"up": 1.0, "down": -1.0, "toward zero": -exact.value.sign()}[direction]
    leaning = (exact.value + sign * ulp / 3).to(rounded_to)
    with pytest.raises(Rejected, match=r"leans|off"):
        check("result", leaning, exact)


@pytest.mark.parametrize("rounded_to", HALVES)
def test_values_that_crowd_round_alike(rounded_to: torch.rounded_to) -> None:
    """All of them a third of an ulp above a number of the dtype, which is no fault of the store."""
    exact = exact_of(rounded_to)
    third = torch.finfo(rounded_to).eps / 3
    crowded = Exact(1 + third + 1e-6 * exact.value, exact.terms, rounded_to)
    check("result", crowded.value.to(rounded_to), crowded)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_pair_of_levels_meets_in_a_case(spec: OpSpec) -> None:
    factors = {"size": spec.sizes, "mix": spec.mixes, "layout": list(spec.layouts), "data": list(DATA)}
    chosen = covering(factors)
    for one, other in itertools.combinations(factors, 2):
        met = {(str(choice[one]), str(choice[other])) for choice in chosen}
        assert len(met) == len(factors[one]) * len(factors[other])
    product = len(spec.sizes) * len(spec.mixes)
    assert len(chosen) < 1.5 * product
    assert covering(factors) == chosen


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_backend_is_spared_a_size(spec: OpSpec, backend: str) -> None:
    served = {case.size for case in cases_for(spec, backend, "cpu", None)}
    assert served == set(spec.sizes)
    if spec in ROW_NORMS:
        assert {size.shape[-1] for size in served} >= {1, 2, 3, 17, 127, 129, 255, 257, 1000, 8193}
    elif spec is INSTANCE_NORM:
        # Its kernels are group norm's; it takes no planes of a single element.
        assert {size.shape[1] for size in served} >= {1, 3, 5, 8, 17}
        assert {math.prod(size.shape[2:]) for size in served} >= {2, 14, 49, 64, 257}
        assert {len(size.shape) for size in served} == {3, 4, 5}
    else:
        assert {size.shape[1] for size in served} >= {1, 3, 8, 17, 64, 130}
        assert {math.prod(size.shape[2:]) for size in served} >= {1, 3, 49, 64, 257}
        assert {len(size.shape) for size in served} == {2, 3, 4, 5}
    if spec is GROUP_NORM:
        assert {size.arguments["num_groups"] for size in served} >= {1, 2, 3, 8}
        assert any(size.arguments["num_groups"] == size.shape[1] > 1 for size in served)
    only = cases_for(spec, backend, "cpu", "bfloat16")
    assert {case.mix.input for case in only} == {torch.bfloat16}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_cases_have_names_of_their_own(spec: OpSpec) -> None:
    names = [str(case) for case in cases(spec)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("layouts", "name"),
    [(layouts, name) for layouts in (LAYOUTS, CHANNEL_LAYOUTS) for name in layouts],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_layouts_keep_shape_dtype_and_what_they_can_of_the_values(layouts: Any, name: str) -> None:
    for shape in ((4, 6), (2, 3, 4), (5,), (0, 3), (1, 1), (2, 3, 4, 5), (2, 0, 3)):
        if len(shape) < 2 and layouts is CHANNEL_LAYOUTS:
            continue
        values = torch.randn(shape).half()
        laid_out = layouts[name](values)
        assert (laid_out.shape, laid_out.dtype) == (values.shape, values.dtype)
        assert laid_out.isfinite().all()
        if name not in ("expanded", "scalar"):
            assert torch.equal(laid_out, values)


def test_unwritten_memory_is_nan() -> None:
    with unwritten_memory_is_nan():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_bits_tell_zeros_apart_and_let_nan_equal_itself() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not same_bits(torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64))


def test_another_triton_than_the_one_asked_for_is_refused() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--triton", "0.1", __file__]
    refused = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120
    )
    assert refused.returncode == 4
    assert "--triton 0.1, but Triton" in refused.stderr


@pytest.mark.parametrize("shard", ["0/2", "3/2", "half"])
def test_a_shard_that_is_none_is_refused(shard: str) -> None:
    from conftest import _shard

    assert _shard("2/2") == (2, 2)
    with pytest.raises(argparse.ArgumentTypeError, match=f"{shard!r} is no shard"):
        _shard(shard)
