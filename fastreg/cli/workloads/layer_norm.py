"""How layer norm is measured; RMS norm is the same without the mean and shares this file."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastreg import functional
from fastreg.cli.gate import Exact, stretch
from fastreg.cli.workloads import BACKWARD, BOTH, FORWARD, Case, Function, Problem, points

EPS = 1e-5

# The CPU shapes run from a model's ordinary rows to a few very long ones. On a GPU every tensor has 2^26 elements, so
# that the caches hold none of it and the launch is a small part of the time.
GRID = {
    "cpu": points(((2048, 768), (8192, 1024), (512, 4096), (64, 65536))),
    "cuda": points(
        (2**26 // hidden_size, hidden_size)
        for hidden_size in (256, 512, 768, 1024, 2048, 4096, 8192, 16384, 65536)
    ),
    "rehearsal": points([(64, 256)]),
}
HOST_CHAINS = ("",)
SECONDS = 8.0
PEERS = ("liger",)
# Rows of one element, odd sizes on both sides of the vector widths, ordinary ones, and one longer than any chip's row.
CHECKS = points(((3, 1), (1, 17), (7, 127), (65, 257), (300, 768), (33, 1000), (2, 8193), (3, 65536)))

# A stretch of rows in float64 that stays in a CPU's last cache level.
STRETCH = 2**19


def bytes_moved(
    rows: int, hidden_size: int, element: int, parameter_element: int, centred: bool
) -> dict[str, int]:
    """Minimum traffic in bytes: every tensor read or written once a direction.

    Forward reads the input and the parameters and writes the output and the statistics; backward reads grad_output,
    input, statistics and weight and writes grad_input and the parameters' gradients.

    Args:
        rows, hidden_size: the shape.
        element, parameter_element: bytes an element of the activations and of the parameters.
        centred: layer norm (mean and rstd a row, weight and bias); else RMS norm (rstd, weight).
    """
    activation = rows * hidden_size * element
    statistics = (2 if centred else 1) * rows * max(4, element)
    parameters = (2 if centred else 1) * hidden_size * parameter_element
    forward = 2 * activation + statistics + parameters
    backward = 3 * activation + statistics + hidden_size * parameter_element + parameters
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def make_problem(case: Case, device: torch.device, parameter_dtype: torch.dtype | None = None) -> Problem:
    """Layer norm of random rows, or RMS norm; random parameters, of the same dtype unless another is given."""
    op, dtype, (rows, hidden_size) = case.op, case.dtype, case.shape
    parameter_dtype = parameter_dtype or dtype
    centred = op == "layer_norm"
    generator = torch.Generator().manual_seed(rows + hidden_size)

    def random(dtype: torch.dtype, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale).add_(shift).to(device, dtype)

    arguments = {
        "input": random(dtype, rows, hidden_size, scale=1.5, shift=0.3),
        "weight": random(parameter_dtype, hidden_size, scale=0.5, shift=1.0),
    }
    if centred:
        arguments["bias"] = random(parameter_dtype, hidden_size)
    grad_output = random(dtype, rows, hidden_size)
    for tensor in arguments.values():
        tensor.requires_grad_()
    normalized_shape = (hidden_size,)

    def torch_function(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if centred:
            return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, EPS)
        return torch.nn.functional.rms_norm(input, normalized_shape, weight, EPS)

    def fastreg_function(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if centred:
            return functional.layer_norm(input, normalized_shape, weight, bias, EPS)
        return functional.rms_norm(input, normalized_shape, weight, EPS)

    return Problem(
        op=op,
        arguments=arguments,
        grad_output=grad_output,
        bytes_moved=bytes_moved(rows, hidden_size, dtype.itemsize, parameter_dtype.itemsize, centred),
        torch_function=torch_function,
        fastreg_function=fastreg_function,
        peers={"liger": _liger(op, device)},
        truth=lambda: exact_results(arguments, grad_output, centred),
    )


def _liger(op: str, device: torch.device) -> Function | str:
    if device.type != "cuda":
        return "Liger's kernels are Triton's and run on a GPU"
    try:
        liger = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError as error:
        return f"{error}: pip install liger-kernel"
    if op == "layer_norm":
        return lambda input, weight, bias: liger.liger_layer_norm(input, weight, bias, EPS)
    # Its default writes the input's gradient over grad_output, which the next round still needs.
    return lambda input, weight: liger.liger_rms_norm(input, weight, EPS, in_place=False)


def exact_results(
    arguments: dict[str, torch.Tensor], grad_output: torch.Tensor, centred: bool
) -> Iterator[Exact]:
    """Output and gradients in float64, with the sums of absolute terms behind each element.

    The difference x - mean is made of the terms |x| and |mean|: where it is small beside them, digits were lost.
    """
    with torch.no_grad():
        rows, hidden_size = grad_output.shape
        weight = arguments["weight"].double()
        bias = arguments["bias"].double() if centred else torch.zeros_like(weight)
        sums = torch.zeros(4, hidden_size, dtype=torch.float64, device=weight.device)
        step = max(1, stretch(grad_output.device, STRETCH) // hidden_size)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            x, dy = arguments["input"][part].double(), grad_output[part].double()
            found = exact_rows(x, x.abs(), dy, weight, bias, centred)
            yield Exact("output", *found.output, (part,))
            yield Exact("grad_input", *found.grad_input, (part,))
            sums += found.sums
        yield Exact("grad_weight", sums[0], sums[1])
        if centred:
            yield Exact("grad_bias", sums[2], sums[3])


@dataclass(frozen=True)
class Rows:
    """What a norm makes of some rows, in float64: values, each with the sums of absolute terms behind it.

    Attributes:
        mean, rstd, normalized, normalized_terms, projection: on the way to the others.
        sums: over the rows, of grad_weight and its terms, and of grad_bias and its terms.
    """

    mean: torch.Tensor
    rstd: torch.Tensor
    normalized: torch.Tensor
    normalized_terms: torch.Tensor
    projection: torch.Tensor
    output: tuple[torch.Tensor, torch.Tensor]
    grad_input: tuple[torch.Tensor, torch.Tensor]
    sums: torch.Tensor


def exact_rows(
    x: torch.Tensor,
    x_terms: torch.Tensor,
    dy: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    centred: bool,
) -> Rows:
    """Layer norm of rows in float64, or RMS norm, forward and backward.

    Args:
        x_terms: the sums of absolute terms that x is made of.
    """
    mean = x.mean(1, keepdim=True) if centred else torch.zeros_like(x[:, :1])
    rstd = ((x - mean).square().mean(1, keepdim=True) + EPS).rsqrt()
    normalized, normalized_terms = (x - mean) * rstd, (x_terms + mean.abs()) * rstd
    scaled = dy * weight
    projection = (scaled * normalized).mean(1, keepdim=True)
    value, terms = scaled - normalized * projection, scaled.abs()
    terms = terms + normalized_terms * (terms * normalized_terms).mean(1, keepdim=True)
    if centred:
        value, terms = value - scaled.mean(1, keepdim=True), terms + scaled.abs().mean(1, keepdim=True)
    return Rows(
        *(mean, rstd, normalized, normalized_terms, projection),
        output=(normalized * weight + bias, normalized_terms * weight.abs() + bias.abs()),
        grad_input=(rstd * value, rstd * terms),
        sums=torch.stack(
            [each.sum(0) for each in (dy * normalized, dy.abs() * normalized_terms, dy, dy.abs())]
        ),
    )
