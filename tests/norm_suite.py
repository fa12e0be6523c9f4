"""What the row-wise norms are tested for besides the covering cases: extreme sizes, non-finite rows, bad arguments."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from cases import Case, Mix, Size
from criterion import Exact, check
from norms import LONG_ROWS, MANY_ROWS
from suite import (
    OpSuite,
    Tensors,
    check_case,
    make_tensors,
    plain_case,
    run,
    run_operators,
    unwritten_memory_is_nan,
)


def _mix(dtype: torch.dtype, parameters: int) -> Mix:
    return Mix((dtype,) * (parameters + 1))


def _rows_of(exact: Exact, chosen: torch.Tensor) -> Exact:
    return replace(exact, value=exact.value[chosen], terms=exact.terms[chosen])


class RowNormSuite(OpSuite):
    """The op suite, and the tests that only a norm over rows has."""

    def case_of(self, size: Size, dtype: torch.dtype, **changes: Any) -> Case:
        return plain_case(self.spec, size, _mix(dtype, len(self.spec.parameters)), **changes)

    def example(
        self, dtype: torch.dtype, device: str, rows: int = 6, columns: int = 40
    ) -> tuple[Case, Tensors]:
        case = self.case_of(Size((rows, columns), {"normalized_shape": (columns,)}), dtype)
        return case, make_tensors(self.spec, case, device)

    # --- sizes ---

    @pytest.mark.parametrize(
        ("size", "low", "data"),
        [
            (size, low, data)
            for place, size in enumerate(LONG_ROWS)
            for low, data in ((torch.float32, "offset"), (torch.bfloat16, "plain"))
            # Both for the shorter ones; they take turns where a row costs an emulated backend seconds.
            if place < 3 or (place % 2 == 0) == (low == torch.bfloat16)
        ],
        ids=str,
    )
    def test_long_rows(self, size: Size, low: torch.dtype, data: str, device: str) -> None:
        check_case(self.spec, self.case_of(size, low, data=data), device)

    def test_more_rows_than_a_grid_dimension_holds(self, device: str) -> None:
        check_case(self.spec, self.case_of(MANY_ROWS, torch.float32), device)

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 257)], ids=str)
    def test_no_rows(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        case = self.case_of(Size(shape, {"normalized_shape": shape[-1:]}), dtype)
        tensors = make_tensors(self.spec, case, device)
        with unwritten_memory_is_nan():
            results = run(self.spec, case, tensors)
            raw, _ = run_operators(self.spec, case, tensors)
        for found in (results, raw):
            assert found["output"].shape == found["grad_input"].shape == shape
            for name in self.spec.parameters:
                torch.testing.assert_close(
                    found[f"grad_{name}"], torch.zeros(shape[-1], dtype=dtype, device=device)
                )

    @pytest.mark.parametrize("shape", [(3, 0), (0, 0)], ids=str)
    def test_no_columns(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        case = self.case_of(Size(shape, {"normalized_shape": shape[-1:]}), dtype)
        results = run(self.spec, case, make_tensors(self.spec, case, device))
        for name, result in results.items():
            assert (result.numel(), result.dtype) == (0, dtype), name
        assert results["output"].shape == results["grad_input"].shape == shape

    def test_rows_far_apart(self, device: str) -> None:
        """Offsets beyond 2^31 elements, in untouched memory that costs nothing."""
        case, tensors = self.example(torch.bfloat16, device, rows=3)
        near = run(self.spec, case, tensors)
        for name in ("input", "grad_output"):
            values = tensors[name]
            assert values is not None
            far = torch.empty(2**31 + 4096, dtype=values.dtype, device=device)
            tensors[name] = far.as_strided(values.shape, (2**30 + 8, 1)).copy_(values)
        apart = run(self.spec, case, tensors)
        for name, result in near.items():
            torch.testing.assert_close(apart[name], result, rtol=0.01, atol=0.01)

    # --- values ---

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_a_nonfinite_value_stays_in_its_row(self, poison: float, dtype: torch.dtype, device: str) -> None:
        for columns in (5, 257):
            case, tensors = self.example(dtype, device, columns=columns)
            input = tensors["input"]
            assert input is not None
            input[2, columns // 2] = poison
            exact, results = self.spec.exact(case, tensors), run(self.spec, case, tensors)
            others = torch.arange(input.shape[0]) != 2
            for name in ("output", "grad_input"):
                check(name, results[name][others.to(device)], _rows_of(exact[name], others))
            assert torch.equal(results["output"][2].isnan().cpu(), exact["output"].value[2].isnan())
            assert results["grad_input"][2].isnan().all()

    @pytest.mark.parametrize("value", [0.0, 1.0, -3.7])
    def test_constant_rows(self, value: float, dtype: torch.dtype, device: str) -> None:
        case, tensors = self.example(dtype, device, columns=257)
        tensors["input"] = torch.full((6, 257), value, dtype=dtype, device=device)
        exact = self.spec.exact(case, tensors)
        for name, result in run(self.spec, case, tensors).items():
            check(name, result, exact[name])

    # --- arguments ---

    def test_signature_is_torchs(self) -> None:
        ours = inspect.signature(self.spec.function).parameters
        torchs = inspect.signature(self.spec.torch_function).parameters
        assert list(ours) == list(torchs)
        assert [each.default for each in ours.values()] == [each.default for each in torchs.values()]

    @pytest.mark.parametrize("convert", [list, torch.Size], ids=["list", "Size"])
    def test_any_sequence_of_ints_is_a_shape(self, convert: type, device: str) -> None:
        case, tensors = self.example(torch.float32, device)
        other = replace(case, arguments={"normalized_shape": convert((40,))})
        for name, result in run(self.spec, other, tensors).items():
            assert torch.equal(result, run(self.spec, case, tensors)[name]), name

    def test_positional_arguments(self, device: str) -> None:
        _, tensors = self.example(torch.float32, device)
        positional = [tensors["input"], (40,), *(tensors[name] for name in self.spec.parameters), 1e-3]
        expected = self.spec.torch_function(*positional)
        torch.testing.assert_close(self.spec.function(*positional), expected)

    @pytest.mark.parametrize(
        ("shape", "arguments"),
        [
            ((3, 4), {"normalized_shape": (5,)}),
            ((3, 4), {"normalized_shape": [5]}),
            ((3, 4), {"normalized_shape": ()}),
            ((3, 4), {"normalized_shape": (2, 3, 4)}),
            ((4,), {"normalized_shape": (3, 4)}),
            ((2, 3, 4), {"normalized_shape": (4, 3)}),
            ((), {"normalized_shape": (1,)}),
            ((3, 4), {"normalized_shape": (4,), "weight": torch.ones(3)}),
            ((3, 4), {"normalized_shape": (4,), "weight": torch.ones(1, 4)}),
            ((3, 4), {"normalized_shape": (4,), "bias": torch.ones(5)}),
            ((3, 4), {"normalized_shape": (3, 4), "bias": torch.ones(4)}),
            ((3, 4), {"normalized_shape": 4}),
            ((3, 4), {"normalized_shape": (4,), "eps": "small"}),
            ((3, 4), {"normalized_shape": (4,), "weight": 1.0}),
            ((3, 4), {}),
        ],
        ids=str,
    )
    def test_bad_shapes_raise_torchs_error(
        self, shape: tuple[int, ...], arguments: dict[str, Any], device: str
    ) -> None:
        if "bias" in arguments and "bias" not in self.spec.parameters:
            arguments = {**arguments, "weight": arguments["bias"]}
            del arguments["bias"]
        given = {
            name: each.to(device) if isinstance(each, torch.Tensor) else each
            for name, each in arguments.items()
        }
        input = torch.randn(shape, device=device)
        with pytest.raises((RuntimeError, ValueError, TypeError)) as expected:
            self.spec.torch_function(input, **given)
        with pytest.raises(type(expected.value)) as raised:
            self.spec.function(input, **given)
        assert str(raised.value) == str(expected.value)

    def test_an_input_that_is_no_tensor(self) -> None:
        with pytest.raises(TypeError, match="input"):
            self.spec.function([1.0, 2.0], (2,))

    @pytest.mark.parametrize(
        "unsupported", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
    )
    def test_an_unsupported_dtype_is_named(self, unsupported: torch.dtype, device: str) -> None:
        input = torch.ones(3, 4, device=device).to(unsupported)
        with pytest.raises(NotImplementedError, match=str(unsupported)):
            self.spec.function(input, (4,))
        with pytest.raises(RuntimeError, match=f"weight.*{unsupported}"):
            self.spec.function(torch.ones(3, 4, device=device), (4,), input[0])

    @pytest.mark.parametrize("parameter", ["weight", "bias"])
    def test_float64_mixes_with_nothing(self, parameter: str, device: str) -> None:
        parameter = parameter if parameter in self.spec.parameters else "weight"
        for one, other in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
            given = {parameter: torch.ones(4, dtype=other, device=device)}
            with pytest.raises(RuntimeError, match=f"{parameter} is {other} where the input is {one}"):
                self.spec.function(torch.ones(3, 4, dtype=one, device=device), (4,), **given)

    @pytest.mark.parametrize("parameter", ["weight", "bias"])
    def test_mixed_devices_are_named(self, parameter: str, device: str) -> None:
        parameter = parameter if parameter in self.spec.parameters else "weight"
        with pytest.raises(RuntimeError, match=f"{parameter} is on meta and the input is on {device}"):
            self.spec.function(
                torch.ones(3, 4, device=device), (4,), **{parameter: torch.ones(4, device="meta")}
            )

    def test_float64_is_served_or_refused_with_the_remedy(self, backend: str, device: str) -> None:
        from backend_under_test import serves_float64

        input = torch.randn(3, 4, dtype=torch.float64, device=device)
        if serves_float64(backend, device):
            torch.testing.assert_close(self.spec.function(input, (4,)), self.spec.torch_function(input, (4,)))
        else:
            with pytest.raises(RuntimeError, match=f"{backend}.*float64"):
                self.spec.function(input, (4,))
