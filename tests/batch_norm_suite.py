"""What batch norm is tested for besides the covering cases: values that are not finite, residuals, halves."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from activations import NAMES
from cases import Case, Mix
from channel_norm_suite import LOW, ChannelNormSuite, check_selected, each_family, selected
from channel_norms import (
    differentiated,
    forward_arguments,
    keeps_signs,
    number_of,
    options_of,
    size,
    unpacked,
)
from criterion import check
from suite import Tensors, make_tensors, plain_case, run, same_bits, unwritten_memory_is_nan

each_phase = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])

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
PARALLEL = {**ChannelNormSuite.parallel, True: ((3, 17, 9, 11),)}


class BatchNormSuite(ChannelNormSuite):
    """The suite of the norms over channels, and the tests that only batch norm has."""

    size = staticmethod(size)
    extremes = EXTREMES
    long = LONG
    phases = ({"training": True}, {"training": False})
    constants = tuple(itertools.product((0.0, 1.0, -3.7), (None, "hardswish")))
    parallel = PARALLEL

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
