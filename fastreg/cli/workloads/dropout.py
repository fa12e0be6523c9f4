"""How the dropout family is measured: activations and residual branches of transformers, maps of convolutional nets.

A chain is a call of ours and as many of torch's as it takes. Its words say what is dropped (elements, unless it is
"path", samples: stochastic depth; or "2d", channels), and "add": the branch is added to a residual.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable

import torch
from torch.nn import functional as F

from fastreg import _units, functional
from fastreg.backends.reference import dropout as formula
from fastreg.cli.gate import Exact, Results, check_share
from fastreg.cli.workloads import BACKWARD, BOTH, FORWARD, Case, Function, Problem, points
from fastreg.cli.workloads._maps import LAYOUTS, drawer, left_out
from fastreg.cli.workloads._random import exact_results, seed_drawn, without_zeros

P = 0.1

# A transformer's tokens, a batch of a ViT-B/16, and few long rows.
_ROWS = ((8192, 768), (32, 197, 768), (2048, 4096))
# Branches of a ViT-B/16, and of the first stage of a ConvNeXt, which is channels_last.
_BRANCH = (32, 197, 768)
_MAP = (32, 96, 56, 56)

GRID = {
    "cpu": (
        *points(_ROWS, chains=("", "add")),
        *points([_BRANCH], chains=("path", "path+add")),
        *points([_MAP], ["channels_last"], ["path+add"]),
        *points([(32, 256, 28, 28)], LAYOUTS, ["2d"]),
    ),
    # Tensors of 2^26 elements, so that the caches hold none of them.
    "cuda": (
        *points(((2**16, 1024), (2**14, 4096)), chains=("", "add")),
        *points([(256, 256, 1024)], chains=("path", "path+add")),
        *points([(256, 256, 32, 32)], ["channels_last"], ["2d"]),
    ),
    "rehearsal": points([(8, 16, 32)], chains=("add", "path+add")),
}
HOST_CHAINS = ("", "add", "path")
SECONDS = 3.0
PEERS = ("torchvision", "timm")
# One element, odd sizes on both sides of the vector widths and of a block of the random stream, several dimensions.
_ANY = ((1,), (8, 1), (7, 127), (65, 257), (33, 1000), (9, 40, 136), (2, 70001))
_MAPS = ((3, 8, 7, 7), (2, 131, 5, 3), (16, 64, 14, 14))
_CHAINS = ("", "add", "path", "path+add")
CHECKS = (
    *points(_ANY, chains=_CHAINS),
    *points(_MAPS, ["contiguous"], ["2d"]),
    *points(_MAPS, ["channels_last"], [*_CHAINS, "2d"]),
)


def bytes_moved(elements: int, element: int, output_element: int, residual: bool) -> dict[str, int]:
    """Minimum traffic in bytes: every tensor read or written once a direction.

    Forward reads the input, and the residual if there is one, and writes the output; backward reads grad_output and
    writes the input's gradient: that of the residual is grad_output itself. A mask costs nothing, since it comes from
    the random stream; the input and the gradient of dropped samples and channels need not be read, which is not
    subtracted.

    Args:
        element, output_element: bytes an element of the input, and of output and residual.
    """
    forward = elements * (element + (2 if residual else 1) * output_element)
    backward = elements * (output_element + element)
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def make_problem(case: Case, device: torch.device, parameter_dtype: torch.dtype | None = None) -> Problem:
    """Dropout of random elements at a rate of 0.1; a residual is of the parameters' dtype if that is wider, as a stream
    of residuals in fp32 between branches in half precision."""
    words = case.chain.split("+")
    shape, dtype = case.shape, case.dtype
    unit = _units.SAMPLE if "path" in words else _units.CHANNEL if "2d" in words else _units.ELEMENT
    output_dtype = torch.promote_types(dtype, parameter_dtype or dtype) if "add" in words else dtype
    random = drawer(case, device)
    arguments = {"input": random(dtype, *shape, scale=1.5, shift=0.3)}
    if "add" in words:
        arguments["residual"] = random(output_dtype, *shape)
    grad_output = without_zeros(random(output_dtype, *shape))
    for tensor in arguments.values():
        tensor.requires_grad_()

    def fastreg_function(input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if unit == _units.SAMPLE:
            return functional.drop_path(input, P, residual=residual)
        if unit == _units.CHANNEL:
            return functional.dropout2d(input, P)
        return (
            functional.dropout(input, P) if residual is None else functional.dropout_add(input, residual, P)
        )

    def truth() -> Iterable[Exact]:
        threshold = round(P * _units.lanes(unit))
        input = arguments["input"]
        kept = formula.keep(input, seed_drawn(device), threshold, None, unit)
        scale = float(formula.keep_scale(threshold, None, unit))
        return exact_results(arguments, grad_output, kept, scale)

    def peer_truth(results: Results) -> Iterable[Exact]:
        # The first element of a unit says whether it is kept, the others are held to that.
        told_apart = {_units.SAMPLE: 1, _units.CHANNEL: 2, _units.ELEMENT: len(shape)}[unit]
        kept = results["grad_input"] != 0
        for dimension in range(told_apart, len(shape)):
            kept = kept.narrow(dimension, 0, 1)
        check_share(kept, P, math.sqrt(P * (1 - P) / kept.numel()))
        return exact_results(arguments, grad_output, kept, 1 / (1 - P))

    return Problem(
        op=case.op,
        arguments=arguments,
        grad_output=grad_output,
        bytes_moved=bytes_moved(
            grad_output.numel(), dtype.itemsize, output_dtype.itemsize, "residual" in arguments
        ),
        torch_function=behind(_torch_branch(unit)),
        fastreg_function=fastreg_function,
        peers={"torchvision": _torchvision(unit), "timm": _timm(unit)},
        truth=truth,
        left_out=left_out(case.op, arguments["input"]),
        peer_truth=peer_truth,
    )


def behind(branch: Function) -> Function:
    """The function, and a residual added to what it returns if there is one."""

    def function(input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        output = branch(input)
        return output if residual is None else residual + output

    return function


def _torch_branch(unit: int) -> Function:
    """torch's own; of samples, for which it has no function, what everybody writes."""
    if unit == _units.ELEMENT:
        return lambda input: F.dropout(input, P)
    if unit == _units.CHANNEL:
        return lambda input: F.dropout2d(input, P)

    def drop_path(input: torch.Tensor) -> torch.Tensor:
        kept = input.new_empty((input.shape[0], *(1,) * (input.dim() - 1))).bernoulli_(1 - P)
        return input * kept.div_(1 - P)

    return drop_path


def _torchvision(unit: int) -> Function | str:
    if unit != _units.SAMPLE:
        return "torchvision drops samples (stochastic_depth); for elements and channels there is torch"
    try:
        ops = importlib.import_module("torchvision.ops")
    except ImportError as error:
        return f"{error}: pip install torchvision"
    return behind(lambda input: ops.stochastic_depth(input, P, "row"))


def _timm(unit: int) -> Function | str:
    if unit != _units.SAMPLE:
        return "timm drops samples (drop_path); for elements and channels there is torch"
    try:
        layers = importlib.import_module("timm.layers")
    except ImportError as error:
        return f"{error}: pip install timm"
    return behind(lambda input: layers.drop_path(input, P, training=True))
