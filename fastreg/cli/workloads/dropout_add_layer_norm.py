"""How dropout + residual + layer norm is measured: behind the branches of a transformer that normalises last.

RMS norm is the same without the mean and shares this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from fastreg import _units, functional
from fastreg.backends.reference import dropout as formula
from fastreg.cli.gate import ROUNDINGS, Exact, Results, check_share, stretch
from fastreg.cli.workloads import BACKWARD, BOTH, FORWARD, Case, Problem, points
from fastreg.cli.workloads._random import seed_drawn
from fastreg.cli.workloads.layer_norm import EPS, STRETCH, Rows, exact_rows

P = 0.1

GRID = {
    "cpu": points(((8192, 768), (32, 197, 768), (2048, 4096))),
    # Tensors of 2^26 elements, so that the caches hold none of them.
    "cuda": points(((2**16, 1024), (2**14, 4096))),
    "rehearsal": points([(8, 16, 32)]),
}
HOST_CHAINS = ("",)
SECONDS = 3.0
PEERS: tuple[str, ...] = ()
# Rows of one element, odd sizes on both sides of the vector widths and of a block of the random stream, long rows.
CHECKS = points(
    ((3, 1), (1, 17), (7, 127), (65, 257), (300, 768), (33, 1000), (4, 5, 136), (2, 8193), (3, 65536))
)


def bytes_moved(
    rows: int, hidden_size: int, element: int, parameter_element: int, centred: bool
) -> dict[str, int]:
    """Minimum traffic in bytes: every tensor read or written once a direction.

    Forward reads input, residual and parameters and writes the sum, the output and the statistics; backward reads
    grad_output, sum, statistics and weight and writes the gradients of input, residual and parameters. A mask costs
    nothing, since it comes from the random stream.

    Args:
        rows, hidden_size: the shape.
        element, parameter_element: bytes an element of the activations and of the parameters.
        centred: layer norm (mean and rstd a row, weight and bias); else RMS norm (rstd, weight).
    """
    activation = rows * hidden_size * element
    statistics = (2 if centred else 1) * rows * max(4, element)
    parameters = (2 if centred else 1) * hidden_size * parameter_element
    forward = 4 * activation + statistics + parameters
    backward = 4 * activation + statistics + hidden_size * parameter_element + parameters
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def make_problem(case: Case, device: torch.device, parameter_dtype: torch.dtype | None = None) -> Problem:
    """Layer norm, or RMS norm, of a residual and a branch with dropout at a rate of 0.1; everything random."""
    dtype, shape, centred = case.dtype, case.shape, case.op.endswith("layer_norm")
    parameter_dtype = parameter_dtype or dtype
    hidden_size = shape[-1]
    generator = torch.Generator().manual_seed(sum(shape))

    def random(dtype: torch.dtype, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale).add_(shift).to(device, dtype)

    arguments = {
        "input": random(dtype, *shape, scale=1.5, shift=0.3),
        "residual": random(dtype, *shape),
        "weight": random(parameter_dtype, hidden_size, scale=0.5, shift=1.0),
    }
    if centred:
        arguments["bias"] = random(parameter_dtype, hidden_size)
    grad_output = random(dtype, *shape)
    for tensor in arguments.values():
        tensor.requires_grad_()
    row = (hidden_size,)

    def torch_function(
        input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        total = residual + F.dropout(input, P)
        return F.layer_norm(total, row, weight, bias, EPS) if centred else F.rms_norm(total, row, weight, EPS)

    def fastreg_function(
        input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> Any:
        if centred:
            return functional.dropout_add_layer_norm(input, residual, row, weight, bias, P, EPS)
        return functional.dropout_add_rms_norm(input, residual, row, weight, P, EPS)

    def truth() -> Iterable[Exact]:
        threshold = round(P * _units.lanes(_units.ELEMENT))
        kept = formula.keep(arguments["input"], seed_drawn(device), threshold, None, _units.ELEMENT)
        scale = float(formula.keep_scale(threshold, None, _units.ELEMENT))
        return exact_results(arguments, grad_output, kept, scale, centred)

    def peer_truth(results: Results) -> Iterable[Exact]:
        kept = _kept_by(results, arguments, centred)
        check_share(kept, P, (P * (1 - P) / kept.numel()) ** 0.5)
        return exact_results(arguments, grad_output, kept, 1 / (1 - P), centred)

    rows = grad_output.numel() // hidden_size
    return Problem(
        op=case.op,
        arguments=arguments,
        grad_output=grad_output,
        bytes_moved=bytes_moved(rows, hidden_size, dtype.itemsize, parameter_dtype.itemsize, centred),
        torch_function=torch_function,
        fastreg_function=fastreg_function,
        peers={},
        truth=truth,
        peer_truth=peer_truth,
    )


def _kept_by(results: Results, arguments: dict[str, torch.Tensor], centred: bool) -> torch.Tensor:
    """The mask of another library: where the input has a gradient.

    A few of millions of gradients are 0 by chance, and then the residual's is too; there the output tells.
    """
    with torch.no_grad():
        kept = results["grad_input"] != 0
        for index in (~kept & (results["grad_residual"] == 0)).nonzero().tolist():
            *leading, column = index
            row = tuple(leading)
            residual = arguments["residual"][row].double()
            branch = arguments["input"][row].double() / (1 - P)
            errors = []
            for choice in (False, True):
                kept[row][column] = choice
                x = torch.where(kept[row], branch, 0.0)[None] + residual
                weight, bias = _parameters(arguments, centred)
                found = exact_rows(x, x.abs(), x, weight, bias, centred).output[0][0, column]
                errors.append(float((found - results["output"][row][column].double()).abs()))
            kept[row][column] = errors[1] < errors[0]
    return kept


def _parameters(arguments: dict[str, torch.Tensor], centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    weight = arguments["weight"].double()
    return weight, arguments["bias"].double() if centred else torch.zeros_like(weight)


def exact_results(
    arguments: dict[str, torch.Tensor],
    grad_output: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
    centred: bool,
) -> Iterator[Exact]:
    """Output and gradients in float64, with the sums of absolute terms behind each element.

    The norm is that of the sum as it was rounded to its dtype. Where a sum in 16 bits lies so close to the middle
    between two numbers that its roundings in fp32 decide which of them it becomes, either may be; terms are added for
    what that changes in its row.

    Args:
        kept: the mask.
        scale: of what is kept. Of the input's gradient no rounding is allowed for where it is dropped: it is 0.
    """
    hidden_size = grad_output.shape[-1]
    shape, dtype = grad_output.shape, grad_output.dtype
    with torch.no_grad():
        weight, bias = _parameters(arguments, centred)
        sums = torch.zeros(4, hidden_size, dtype=torch.float64, device=weight.device)
        row = grad_output[0].numel()
        step = max(1, stretch(grad_output.device, STRETCH) // row)
        for start in range(0, shape[0], step):
            part = slice(start, start + step)

            def rows(tensor: torch.Tensor, part: slice = part) -> torch.Tensor:
                return tensor[part].reshape(-1, hidden_size)

            mask = rows(kept)
            branch = torch.where(mask, rows(arguments["input"]).double() * scale, 0.0)
            residual = rows(arguments["residual"]).double()
            x, x_terms = branch + residual, branch.abs() + residual.abs()
            doubt = torch.zeros_like(x)
            if dtype.itemsize == 2:
                least, most = ((x + sign * 2.0**-22 * x_terms).to(dtype).double() for sign in (-1, 1))
                x, doubt = x.to(dtype).double(), most - least
            dy = rows(grad_output).double()
            found = exact_rows(x, x_terms, dy, weight, bias, centred)
            in_output, in_gradient, in_weight = _consequences(found, doubt, dy, weight)
            (output, output_terms), (gradient, terms) = found.output, found.grad_input
            terms = terms + in_gradient
            of_branch = (torch.where(mask, each * scale, 0.0) for each in (gradient, terms))
            for name, of_rows in (
                ("output", (output, output_terms + in_output)),
                ("grad_residual", (gradient, terms)),
                ("grad_input", of_branch),
            ):
                value, terms = (each.view(-1, *shape[1:]) for each in of_rows)
                yield Exact(name, value, terms, (part,))
            sums += found.sums
            sums[1] += in_weight
        yield Exact("grad_weight", sums[0], sums[1])
        if centred:
            yield Exact("grad_bias", sums[2], sums[3])


def _consequences(
    found: Rows, doubt: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What changes of the norm's input, each of at most ``doubt``, change to first order; as terms of the budget.

    Returns:
        for output, grad_input and grad_weight.
    """
    size, rstd = found.normalized.abs(), found.rstd
    moved = doubt + doubt.mean(1, keepdim=True)
    of_rstd = rstd * (size * moved).mean(1, keepdim=True)
    normalized = rstd * moved + size * of_rstd
    scaled = (dy * weight).abs()
    gradient = found.grad_input[0].abs() * of_rstd + rstd * (
        normalized * found.projection.abs() + size * (scaled * normalized).mean(1, keepdim=True)
    )
    allowance = ROUNDINGS * 2.0**-24
    changes = (normalized * weight.abs(), gradient, (dy.abs() * normalized).sum(0))
    in_output, in_gradient, in_weight = (each / allowance for each in changes)
    return in_output, in_gradient, in_weight
