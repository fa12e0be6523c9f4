"""What the norms over channels are tested for besides the covering cases: extreme sizes, non-finite values, halves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from activations import NAMES
from backend_under_test import emulated
from cases import Case, Mix, Size
from channel_norms import (
    differentiated,
    forward_arguments,
    keeps_signs,
    number_of,
    options_of,
    size,
    unpacked,
)
from criterion import Exact, check
from suite import (
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
each_phase = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])

# More of everything than fits a grid dimension, a block, or the fp32 mantissa of a running sum; and the same in small
# for the emulated backends, which need minutes for the large ones.
EXTREMES = {
    "rows": (size(65_539, 3), size(4_099, 3), "contiguous"),
    "planes": (size(65_539, 1, 2), size(4_099, 1, 2), "contiguous"),
    "pixels of planes": (size(1, 2, 65_539), size(1, 2, 8_209), "contiguous"),
    "pixels of rows": (size(1, 2, 65_539), size(1, 2, 4_099), "channels_last"),
    "channels of planes": (size(3, 4_096, 2), size(2, 515, 2), "contiguous"),
    "channels of rows": (size(3, 4_096, 2), size(2, 1_030, 2), "channels_last"),
    "both of planes": (size(4, 5, 128, 129), size(3, 2, 33, 65), "contiguous"),
    "both of rows": (size(4, 5, 128, 129), size(3, 5, 33, 17), "channels_last"),
}
LONG = {True: size(2, 2, 4_099), False: size(3, 2, 333_337)}


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
    """The op suite, and the tests that only a norm over channels has."""

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
        case = self.case_of(size(*shape or (3, 5, 4, 7)), dtype, family, **arguments)
        return case, make_tensors(self.spec, case, device)

    # --- sizes ---

    @pytest.mark.parametrize("name", list(EXTREMES))
    def test_extreme_sizes(self, name: str, backend: str, device: str) -> None:
        large, small, family = EXTREMES[name]
        low = torch.bfloat16 if family == "channels_last" else torch.float32
        chosen = small if emulated(backend, device) else large
        check_case(self.spec, self.case_of(chosen, low, family, activation="relu"), device)

    @each_family
    def test_sums_of_a_million(self, family: str, backend: str, device: str) -> None:
        """A mean of 1000 standard deviations over as many elements as a kernel meets: partial sums must be merged."""
        long = LONG[emulated(backend, device)]
        case = replace(self.case_of(long, torch.float32, family), data="offset")
        check_case(self.spec, case, device)

    @each_family
    @each_phase
    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 5), (4, 0, 3), (0, 0, 2)], ids=str)
    def test_nothing(
        self, shape: tuple[int, ...], family: str, training: bool, dtype: torch.dtype, device: str
    ) -> None:
        """Zero gradients, as torch's, and running statistics that nothing touched."""
        for activation in (None, "relu", "silu"):
            case, tensors = self.example(
                dtype, device, family, *shape, training=training, activation=activation
            )
            with unwritten_memory_is_nan():
                results = run(self.spec, case, tensors)
                raw, _ = run_operators(self.spec, case, tensors)
            for found in (results, raw):
                for name in ("output", "grad_input", "grad_residual"):
                    assert (found[name].shape, found[name].dtype) == (shape, dtype), name
                for name in ("grad_weight", "grad_bias"):
                    assert torch.equal(found[name], torch.zeros(shape[1], dtype=dtype, device=device)), name
                for name in self.spec.buffers:
                    assert same_bits(found[name], tensors[name]), name  # type: ignore[arg-type]

    @each_phase
    def test_planes_and_rows_far_apart(self, training: bool, device: str) -> None:
        """Offsets beyond 2^31 elements, in untouched memory that costs nothing."""
        for strides in ((2**30 + 8, 7, 1), (2**30 + 8, 1, 1)):
            shape = (3, 5, 7) if strides[1] == 7 else (3, 5, 1)
            case, tensors = self.example(
                torch.bfloat16, device, "contiguous", *shape, training=training, activation="gelu"
            )
            for name in ("input", "residual", "grad_output"):
                values = tensors[name]
                assert values is not None
                far = torch.empty(2**31 + 4096, dtype=values.dtype, device=device)
                tensors[name] = far.as_strided(shape, strides).copy_(values)
            exact = self.spec.exact(case, tensors)
            for name, result in run(self.spec, case, tensors).items():
                check(name, result, exact[name])

    # --- values ---

    @each_family
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_a_nonfinite_value_stays_in_its_channel(
        self, poison: float, family: str, dtype: torch.dtype, device: str
    ) -> None:
        for shape, activation in (((3, 5, 4, 7), None), ((3, 5, 1, 67), "relu"), ((9, 33), "silu")):
            case, tensors = self.example(dtype, device, family, *shape, activation=activation)
            input = tensors["input"]
            assert input is not None
            input[1, 2] = poison
            others = torch.ones(shape, dtype=torch.bool)
            others[:, 2] = False
            exact, results = self.spec.exact(case, tensors), run(self.spec, case, tensors)
            check_selected(results, exact, others)
            for name in ("output", "grad_input"):
                assert results[name][:, 2].isnan().all(), name
            assert not results["running_mean"][2].isfinite()
            assert not results["running_var"][2].isfinite()

    @each_family
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_a_nonfinite_value_stays_in_its_element_in_evaluation(
        self, poison: float, family: str, dtype: torch.dtype, device: str
    ) -> None:
        for activation in (None, "leaky_relu", "gelu"):
            case, tensors = self.example(dtype, device, family, training=False, activation=activation)
            input = tensors["input"]
            assert input is not None
            input[1, 2, 3, 4] = poison
            others = torch.ones(input.shape, dtype=torch.bool)
            others[1, 2, 3, 4] = False
            exact, results = self.spec.exact(case, tensors), run(self.spec, case, tensors)
            of_elements = {name: result for name, result in results.items() if result.dim() > 1}
            check_selected(of_elements, exact, others)
            others[:, 2] = False
            check_selected(results, exact, others)
            if poison != poison:
                assert results["output"][1, 2, 3, 4].isnan()

    @each_family
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
    def test_running_statistics_can_skip_what_is_not_finite(
        self, poison: float, family: str, dtype: torch.dtype, device: str
    ) -> None:
        case, tensors = self.example(dtype, device, family, skip_nonfinite=True)
        input = tensors["input"]
        assert input is not None
        input[1, 2, 3, 4] = poison
        exact, results = self.spec.exact(case, tensors), run(self.spec, case, tensors)
        others = torch.arange(5) != 2
        for name in self.spec.buffers:
            before = tensors[name]
            assert before is not None
            assert same_bits(results[name][2], before[2])
            check(name, results[name][others.to(device)], selected(exact[name], others[None, :, None]))

    @each_family
    @pytest.mark.parametrize("value", [0.0, 1.0, -3.7])
    def test_constant_channels(self, value: float, family: str, dtype: torch.dtype, device: str) -> None:
        for activation in (None, "hardswish"):
            case, tensors = self.example(dtype, device, family, 2, 9, 257, activation=activation)
            input = tensors["input"]
            assert input is not None
            input.fill_(value)
            exact = self.spec.exact(case, tensors)
            for name, result in run(self.spec, case, tensors).items():
                check(name, result, exact[name])

    @each_family
    @pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
    @pytest.mark.parametrize("data", ["plain", "offset"])
    def test_backward_takes_the_branch_that_forward_took(
        self, activation: str, data: str, family: str, device: str
    ) -> None:
        """Bit for bit, also where the argument is within a rounding of zero: a residual cancels the rest of it."""
        for given in (False, True):
            for low in (torch.float32, torch.bfloat16):
                case, tensors = self.example(
                    low, device, family, 4, 19, 3, 11, training=False, activation=activation
                )
                input, grad_output = tensors["input"], tensors["grad_output"]
                assert input is not None
                assert grad_output is not None
                if given:
                    without = replace(case, wanted=(), arguments={"training": False})
                    plain = run(self.spec, without, {**tensors, "residual": None})["output"]
                    tensors["residual"] = -plain
                else:
                    tensors["residual"] = None
                    tensors["bias"] = None
                grad_output.copy_(torch.where(grad_output == 0, 1, grad_output))
                results = run(self.spec, case, tensors)
                if given:
                    kept = results["grad_residual"] == grad_output
                else:
                    size = results["grad_input"].float().abs()
                    kept = size > 0.5 * size.new_tensor(self._slopes(case, tensors)) * grad_output.abs()
                assert torch.equal(kept, results["output"] > 0)

    def _slopes(self, case: Case, tensors: Tensors) -> Any:
        """The scale of every channel in evaluation, shaped to meet the input."""
        weight, variance = tensors["weight"], tensors["running_var"]
        assert weight is not None
        assert variance is not None
        scale = weight.double().abs() / (variance.double() + options_of(case)["eps"]).sqrt()
        return scale[:, None, None].tolist()

    # --- options ---

    @each_phase
    @pytest.mark.parametrize("other", LOW, ids=str)
    @pytest.mark.parametrize("one", LOW, ids=str)
    def test_a_residual_of_another_dtype(
        self, one: torch.dtype, other: torch.dtype, training: bool, device: str
    ) -> None:
        mix = Mix((one, other, *(torch.float32,) * 4))
        for activation in (None, "relu", "gelu"):
            arguments = {"training": training, "activation": activation}
            case = plain_case(self.spec, size(3, 17, 5, 7), mix, arguments=arguments)
            tensors = make_tensors(self.spec, case, device)
            exact = self.spec.exact(case, tensors)
            for name, result in run(self.spec, case, tensors).items():
                check(name, result, exact[name])

    # What torch's own sums, and so the reference's, depend on.
    @pytest.mark.only(backend=("native", "triton", "cuda_sim"))
    @each_family
    def test_any_number_of_threads_gives_the_same_bits(self, family: str, backend: str, device: str) -> None:
        shapes = (
            ((3, 17, 9, 11),)
            if emulated(backend, device)
            else ((3, 17, 9, 11), (8, 64, 28, 28), (2, 3, 150_001))
        )
        previous = torch.get_num_threads()
        for shape in shapes:
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

    # --- the halves, between which a synchronised batch norm asks the other processes ---

    @each_family
    @pytest.mark.parametrize("activation", [None, *NAMES[1:]])
    def test_the_halves_make_a_whole(
        self, activation: str | None, family: str, dtype: torch.dtype, device: str
    ) -> None:
        for shape in ((3, 17, 5, 7), (65, 9)):
            for residual in (True, False):
                case, tensors = self.example(dtype, device, family, *shape, activation=activation)
                if not residual:
                    tensors["residual"] = None
                exact = self.spec.exact(case, tensors)
                with unwritten_memory_is_nan():
                    found = run_halves(case, tensors)
                for name, result in found.items():
                    check(name, result, exact[name])
                    assert self.spec.laid_out(name, result, tensors), (name, result.stride())

    @each_family
    def test_the_halves_of_nothing(self, family: str, dtype: torch.dtype, device: str) -> None:
        for shape in ((0, 5), (0, 3, 4, 4), (2, 3, 0), (3, 0, 7)):
            case, tensors = self.example(dtype, device, family, *shape, activation="relu")
            with unwritten_memory_is_nan():
                found = run_halves(case, tensors)
            assert found["output"].shape == found["grad_input"].shape == found["grad_residual"].shape == shape
            for name in ("mean", "grad_weight", "grad_bias"):
                assert torch.equal(found[name], torch.zeros_like(found[name])), name


def run_halves(case: Case, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The results of a whole, put together from moments, apply, sums and bwd_apply as one process alone would do."""
    operators, options = torch.ops.fastreg, options_of(case)
    input, residual, weight, bias = forward_arguments(case, tensors)[:4]
    count = input.shape[0] * input.shape[2:].numel()
    activated = number_of(case), options["negative_slope"]
    mean, squares = operators.batch_norm_moments(input)
    statistics = torch.stack((mean, torch.rsqrt(squares / max(count, 1) + options["eps"])))
    output, signs = operators.batch_norm_apply(input, residual, weight, bias, statistics, *activated, True)
    given = (*differentiated(case, tensors, signs), statistics, weight, bias)
    sums = operators.batch_norm_sums(*given, *activated)
    mask = [True, residual is not None and number_of(case) != 0]
    grads = operators.batch_norm_bwd_apply(*given, sums / max(count, 1), *activated, mask)
    results = {"output": output, "mean": mean, "rstd": statistics[1], "signs": unpacked(signs)}
    if not keeps_signs(case, tensors):
        assert signs.shape == (0,)
    results["grad_input"] = grads[0]
    if mask[1]:
        results["grad_residual"] = grads[1]
    else:
        assert grads[1].shape == (0,)
    for name, parameter, total in (("grad_weight", weight, sums[1]), ("grad_bias", bias, sums[0])):
        results[name] = total.to(parameter.dtype)
    return results
