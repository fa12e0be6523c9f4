"""What every norm over channels is tested for besides the covering cases: extreme sizes, constants, thread counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from backend_under_test import emulated
from cases import Case, Size
from criterion import Exact, check
from suite import (
    OpSpec,
    OpSuite,
    Tensors,
    check_case,
    make_tensors,
    plain_case,
    run,
    run_operators,
    same_bits,
    unwritten_memory_is_nan,
)

FAMILIES = ("contiguous", "channels_last")
LOW = (torch.float32, torch.bfloat16, torch.float16)
each_family = pytest.mark.parametrize("family", FAMILIES)
EXTREMES = (
    *("rows", "planes", "pixels of planes", "pixels of rows", "channels of planes", "channels of rows"),
    *("both of planes", "both of rows"),
)


def _extreme(name: str) -> Any:
    """Channels of planes are programs, which the interpreter runs one by one: half a minute of them."""
    long = name == "channels of planes"
    return pytest.param(name, marks=pytest.mark.complete(backend=("triton",)) if long else ())


def selected(exact: Exact, chosen: torch.Tensor) -> Exact:
    """Of something with a channel dimension the elements where ``chosen``, which has the input's shape, is true."""
    if exact.value.dim() == 1:
        chosen = chosen.movedim(1, 0).flatten(1).any(1)
    return replace(exact, value=exact.value[chosen], terms=exact.terms.expand_as(exact.value)[chosen])


def check_selected(results: dict[str, torch.Tensor], exact: dict[str, Exact], chosen: torch.Tensor) -> None:
    """Hold results to the exact values where ``chosen`` is true."""
    for name, result in results.items():
        of_channels = chosen.movedim(1, 0).flatten(1).any(1)
        where = of_channels if result.dim() == 1 else chosen
        check(name, result[where.to(result.device)], selected(exact[name], chosen))


class ChannelNormSuite(OpSuite):
    """The op suite, and the tests that every norm over channels has.

    Attributes:
        size: a shape to a size with the arguments that go with it.
        extremes: by the names in ``EXTREMES`` more of everything than fits a grid dimension, a block, or the fp32
            mantissa of a running sum; the same in small for the emulated backends, which need minutes for the large
            ones; and the layout.
        long: as many elements in one sum as a kernel meets, in small for the emulated backends and in large.
        phases: the arguments by which a norm takes its statistics from here or there.
        constants: values of constant channels, with an activation.
        parallel: shapes for the emulated backends and for those with threads to share them.
    """

    size: ClassVar[Callable[..., Size]]
    extremes: ClassVar[Mapping[str, tuple[Size, Size, str]]]
    long: ClassVar[Mapping[bool, Size]]
    phases: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    constants: ClassVar[tuple[tuple[float, str | None], ...]] = ((0.0, None), (-3.7, "hardswish"))
    parallel: ClassVar[Mapping[bool, tuple[tuple[int, ...], ...]]] = {
        True: ((2, 6, 5, 7),),
        False: ((3, 17, 9, 11), (8, 64, 28, 28), (2, 3, 150_001)),
    }

    def case_of(self, size: Size, dtype: torch.dtype, family: str = "contiguous", **arguments: Any) -> Case:
        return plain_case(
            *(self.spec, size, self.spec.mix(dtype)),
            layout=family,
            grad_layout=family,
            companion_layout=family,
            arguments=arguments,
        )

    def example(
        self, dtype: torch.dtype, device: str, family: str, *shape: int, **arguments: Any
    ) -> tuple[Case, Tensors]:
        case = self.case_of(type(self).size(*shape or (3, 5, 4, 7)), dtype, family, **arguments)
        return case, make_tensors(self.spec, case, device)

    # --- sizes ---

    @pytest.mark.parametrize("name", [_extreme(name) for name in EXTREMES])
    def test_extreme_sizes(self, name: str, backend: str, device: str) -> None:
        large, small, family = self.extremes[name]
        low = torch.bfloat16 if family == "channels_last" else torch.float32
        chosen = small if emulated(backend, device) else large
        check_case(self.spec, self.case_of(chosen, low, family, activation="relu"), device)

    @pytest.mark.every_kernel
    @each_family
    def test_sums_of_a_million(self, family: str, backend: str, device: str) -> None:
        """A mean of 1000 standard deviations over as many elements as a kernel meets: partial sums must be merged."""
        long = self.long[emulated(backend, device)]
        case = replace(self.case_of(long, torch.float32, family), data="offset")
        check_case(self.spec, case, device)

    @each_family
    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 5), (4, 0, 3), (0, 0, 2)], ids=str)
    def test_nothing(self, shape: tuple[int, ...], family: str, dtype: torch.dtype, device: str) -> None:
        """Zero gradients, as torch's, and running statistics that nothing touched."""
        for phase in self.phases:
            for activation in (None, "relu", "silu"):
                case, tensors = self.example(dtype, device, family, *shape, **phase, activation=activation)
                check_nothing(self.spec, case, tensors)

    def test_planes_and_rows_far_apart(self, device: str) -> None:
        """Offsets beyond 2^31 elements, in untouched memory that costs nothing."""
        for phase in self.phases:
            for shape, strides in (((3, 5, 7), (2**30 + 8, 7, 1)), ((3, 5, 1), (2**30 + 8, 1, 1))):
                case, tensors = self.example(
                    torch.bfloat16, device, "contiguous", *shape, **phase, activation="gelu"
                )
                for name in ("input", *self.spec.companions, "grad_output"):
                    values = tensors[name]
                    assert values is not None
                    far = torch.empty(2**31 + 4096, dtype=values.dtype, device=device)
                    tensors[name] = far.as_strided(shape, strides).copy_(values)
                exact = self.spec.exact(case, tensors)
                for name, result in run(self.spec, case, tensors).items():
                    check(name, result, exact[name])

    # --- values ---

    @each_family
    def test_constant_channels(self, family: str, dtype: torch.dtype, device: str) -> None:
        for value, activation in self.constants:
            case, tensors = self.example(dtype, device, family, 2, 9, 257, activation=activation)
            input = tensors["input"]
            assert input is not None
            input.fill_(value)
            exact = self.spec.exact(case, tensors)
            for name, result in run(self.spec, case, tensors).items():
                check(name, result, exact[name])

    # What torch's own sums, and so the reference's, depend on.
    @pytest.mark.only(backend=("native", "triton", "cuda_sim"))
    @each_family
    def test_any_number_of_threads_gives_the_same_bits(self, family: str, backend: str, device: str) -> None:
        previous = torch.get_num_threads()
        for shape in self.parallel[emulated(backend, device)]:
            case, tensors = self.example(torch.float32, device, family, *shape, activation="silu")
            found = []
            try:
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    found.append(run(self.spec, case, tensors))
            finally:
                torch.set_num_threads(previous)
            for others in found[1:]:
                for name, result in found[0].items():
                    assert same_bits(result, others[name]), name


def check_nothing(spec: OpSpec, case: Case, tensors: Tensors) -> None:
    """Of an empty input: empty results, zero gradients of the parameters, buffers that keep every bit."""
    shape, dtype = case.size.shape, case.mix.input
    with unwritten_memory_is_nan():
        results = run(spec, case, tensors)
        raw, _ = run_operators(spec, case, tensors)
    for found in (results, raw):
        for name in ("output", *(f"grad_{each}" for each in ("input", *spec.companions))):
            assert (found[name].shape, found[name].dtype) == (shape, dtype), name
        for name in spec.parameters:
            gradient = found[f"grad_{name}"]
            assert torch.equal(gradient, torch.zeros(shape[1], dtype=dtype, device=gradient.device)), name
        for name in spec.buffers:
            assert same_bits(found[name], tensors[name]), name  # type: ignore[arg-type]
