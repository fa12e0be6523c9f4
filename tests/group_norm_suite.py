"""What group norm and instance norm are tested for besides the covering cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backend_under_test import emulated
from cases import Mix, Size
from channel_norm_suite import ChannelNormSuite, check_nothing, check_selected, each_family
from group_norms import size
from suite import OpSuite, check_case, make_tensors, plain_case, run, same_bits

POISONS = (torch.nan, torch.inf, -torch.inf)

EXTREMES = {
    "rows": (size(65_539, 3), size(67, 3), "contiguous"),
    "planes": (size(65_539, 1, 2), size(67, 1, 2), "contiguous"),
    "pixels of planes": (size(1, 2, 65_539), size(1, 2, 4_099), "contiguous"),
    "pixels of rows": (size(1, 2, 65_539), size(1, 2, 4_099), "channels_last"),
    "channels of planes": (size(3, 4_096, 2, groups=2_048), size(1, 64, 2, groups=32), "contiguous"),
    "channels of rows": (size(3, 4_096, 2, groups=1), size(2, 1_030, 2, groups=1), "channels_last"),
    "both of planes": (size(4, 5, 128, 129), size(3, 2, 33, 65, groups=1), "contiguous"),
    "both of rows": (size(4, 6, 128, 129, groups=3), size(3, 6, 33, 17, groups=3), "channels_last"),
}
LONG = {True: size(1, 3, 1_033), False: size(1, 3, 333_337)}


class GroupNormSuite(ChannelNormSuite):
    """The suite of the norms over channels, and the tests that only group norm has."""

    size = staticmethod(size)
    extremes = EXTREMES
    long = LONG

    @each_family
    def test_a_nonfinite_value_stays_in_its_group_and_sample(
        self, family: str, dtype: torch.dtype, device: str
    ) -> None:
        for poison, shape, groups, activation in (
            (torch.nan, (3, 6, 4, 7), 3, "relu"),
            (torch.inf, (2, 5, 1, 33), 5, None),
            (-torch.inf, (2, 4, 1, 5), 2, "silu"),
        ):
            sized = size(*shape, groups=groups)
            case = self.case_of(sized, dtype, family, activation=activation)
            tensors = make_tensors(self.spec, case, device)
            input, channels = tensors["input"], shape[1] // groups
            assert input is not None
            input[1, 2, 0, 3] = poison
            first = 2 // channels * channels
            reached = torch.zeros(shape, dtype=torch.bool)
            reached[1, first : first + channels] = True
            exact, results = self.spec.exact(case, tensors), run(self.spec, case, tensors)
            check_selected({name: results[name] for name in ("output", "grad_input")}, exact, ~reached)
            for name in ("output", "grad_input"):
                assert results[name][reached.to(device)].isnan().all(), name
            reached[:, first : first + channels] = True
            check_selected({name: results[name] for name in ("grad_weight", "grad_bias")}, exact, ~reached)

    @each_family
    def test_backward_takes_the_branch_that_forward_took(self, family: str, device: str) -> None:
        """Bit for bit, where the argument is a rounding or two: the bias cancels the rest of it.

        Both pixels of a channel are equal, and of one sample: what is summed to the gradient of the bias shows both.
        """
        for slope, low, data in ((0.0, torch.float32, "offset"), (0.5, torch.bfloat16, "plain")):
            mix = Mix((low, *(torch.float32,) * 2))
            arguments = {"activation": "leaky_relu", "negative_slope": slope}
            case = plain_case(
                *(self.spec, size(1, 258, 2, groups=2), mix),
                layout=family,
                grad_layout=family,
                data=data,
                arguments=arguments,
            )
            tensors = make_tensors(self.spec, case, device)
            input, grad_output, bias = (tensors[name] for name in ("input", "grad_output", "bias"))
            assert input is not None
            assert grad_output is not None
            assert bias is not None
            input[..., 1] = input[..., 0]
            # Of powers of two, sums of which tell what was added.
            grad_output[..., 0], grad_output[..., 1] = 1.0, 8.0
            wide = {**tensors, "input": input.float(), "bias": None}
            plain = replace(case, mix=self.spec.mix(torch.float32), wanted=(), arguments=case.size.arguments)
            cancelled = run(self.spec, plain, wide)["output"][0, :, 0]
            # A rounding more or less, so that also without fma there is something left.
            bias.copy_(-cancelled * (1 + torch.finfo(bias.dtype).eps * bias.sign()))
            results = run(self.spec, case, tensors)
            positive = results["output"] > 0
            assert 0 < positive.sum() < positive.numel()
            expected = torch.where(positive, 1.0, slope) * grad_output.float()
            assert torch.equal(results["grad_bias"], expected.sum((0, 2)))


class InstanceNormSuite(OpSuite):
    """The op suite, and what is not group norm's: running statistics."""

    @each_family
    def test_many_samples(self, family: str, backend: str, device: str) -> None:
        """The running statistics are sums over them."""
        samples = 67 if emulated(backend, device) else 8_209
        case = plain_case(
            *(self.spec, Size((samples, 3, 2)), self.spec.mix(torch.float32)),
            layout=family,
            grad_layout=family,
            data="offset",
        )
        check_case(self.spec, case, device)

    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
    def test_nothing(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        """Zero gradients, as torch's, and running statistics that nothing touched."""
        case = plain_case(self.spec, Size(shape), self.spec.mix(dtype), arguments={"activation": "relu"})
        check_nothing(self.spec, case, make_tensors(self.spec, case, device))

    @each_family
    def test_a_nonfinite_value_stays_in_its_channel(
        self, family: str, dtype: torch.dtype, device: str
    ) -> None:
        for poison in POISONS:
            case = plain_case(
                *(self.spec, Size((3, 5, 4, 7)), self.spec.mix(dtype)),
                layout=family,
                arguments={"activation": "silu"},
            )
            tensors = make_tensors(self.spec, case, device)
            input = tensors["input"]
            assert input is not None
            input[1, 2, 0, 3] = poison
            reached = torch.zeros(input.shape, dtype=torch.bool)
            reached[1, 2] = True
            exact, results = self.spec.exact(case, tensors), run(self.spec, case, tensors)
            of_channels = {name: result for name, result in results.items() if result.dim() == 1}
            of_elements = {name: result for name, result in results.items() if result.dim() > 1}
            check_selected(of_elements, exact, ~reached)
            reached[:, 2] = True
            check_selected(of_channels, exact, ~reached)
            for name in self.spec.buffers:
                assert not results[name][2].isfinite(), name

    # What torch's own sums, and so the reference's, depend on.
    @pytest.mark.only(backend=("native", "triton", "cuda_sim"))
    def test_any_number_of_threads_gives_the_same_bits(self, device: str) -> None:
        case = plain_case(self.spec, Size((7, 5, 9, 11)), self.spec.mix(torch.float32))
        tensors, previous, found = make_tensors(self.spec, case, device), torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(run(self.spec, case, tensors))
        finally:
            torch.set_num_threads(previous)
        for others in found[1:]:
            for name, result in found[0].items():
                assert same_bits(result, others[name]), name
