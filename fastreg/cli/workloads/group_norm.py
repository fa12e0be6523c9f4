"""How group norm is measured: the layers of Stable Diffusion's U-Net and image decoder, and of detection heads.

A chain is an activation behind the norm, "silu" or "relu": one call of ours, two of torch's. Instance norm is the same
with a group for every channel, and shares this file.
"""

from __future__ import annotations

import importlib

import torch
from torch.nn import functional as F

from fastreg import functional
from fastreg.cli.workloads import BACKWARD, BOTH, FORWARD, Case, Function, Point, Problem, points
from fastreg.cli.workloads._group_norm_truth import (
    ACTIVATIONS,
    KINKED,
    Setting,
    exact_results,
    silence_the_kink,
)
from fastreg.cli.workloads._maps import LAYOUTS, drawer, left_out

EPS = 1e-5
MOMENTUM = 0.1

# The norms of the U-Net of 64 x 64 latents, and of the decoder that makes 512 x 512 pixels of them.
_UNET = ((320, 64), (640, 32), (1280, 16), (1280, 8))
_DECODER = ((512, 64), (512, 128), (256, 256), (128, 512))
# Of a detector on images of 800 x 1216, the levels of its feature pyramid.
_PYRAMID = ((100, 152), (50, 76), (25, 38), (13, 19), (7, 10))


def _maps(samples: int, layers: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple((samples, channels, side, side) for channels, side in layers)


def _heads(levels: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple((2, 256, *level) for level in levels)


def _grid(
    diffusion: tuple[tuple[int, ...], ...], detection: tuple[tuple[int, ...], ...]
) -> tuple[Point, ...]:
    """The norms of a diffusion model with SiLU, of a detector with ReLU, and the largest of these alone."""
    return tuple(
        point
        for layout in LAYOUTS
        for chain, shapes in (("silu", diffusion), ("relu", detection), ("", detection[:1]))
        for point in points(shapes, [layout], [chain])
    )


GRID = {
    # Batch 8 of the decoder's larger maps takes gigabytes.
    "cpu": _grid(
        _maps(1, _UNET[:3]) + _maps(8, _UNET) + _maps(1, (_DECODER[0], *_DECODER[2:])), _heads(_PYRAMID[:4])
    ),
    "cuda": _grid(_maps(1, _UNET + _DECODER) + _maps(8, _UNET + _DECODER), _heads(_PYRAMID)),
    "rehearsal": points([(1, 64, 8, 8)], ["contiguous"], ["silu"]),
}
HOST_CHAINS = ("", "silu")
SECONDS = 3.0
PEERS = ("liger",)
# One plane, one group, odd sizes on both sides of the vector widths, long planes, many channels, 2-D to 5-D.
_FLAT = ((2, 8), (65, 17), (3, 40, 5), (1, 3, 257))
_MAPS = ((2, 10, 1, 1), (3, 8, 7, 7), (2, 131, 5, 3), (2, 6, 150, 217), (1, 320, 16, 16), (2, 24, 3, 5, 7))
_CHAINS = ("", "relu", "silu")
CHECKS = points((*_FLAT, *_MAPS), ["contiguous"], _CHAINS) + points(_MAPS, ["channels_last"], _CHAINS)


def groups_of(channels: int) -> int:
    """32 as in all of these models; of fewer channels the most groups that have two each, if there are any."""
    return max(
        count for count in range(1, 33) if channels % count == 0 and (count == 1 or channels >= 2 * count)
    )


def bytes_moved(
    elements: int, samples: int, groups: int, channels: int, element: int, parameter_element: int
) -> dict[str, int]:
    """Minimum traffic in bytes: every tensor read or written once a direction.

    That is what can be reached where a group stays on chip: 2 passes over the activation forward and 3 backward. A
    kernel that reads the input a second time moves more than is counted for it here.

    Args:
        elements, samples, channels: of the input.
        element, parameter_element: bytes an element of the activations and of the parameters.
    """
    activation = elements * element
    statistics = 2 * samples * groups * max(4, element)
    parameters = 2 * channels * parameter_element
    forward = 2 * activation + statistics + parameters
    backward = 3 * activation + statistics + 2 * parameters
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def make_problem(case: Case, device: torch.device, parameter_dtype: torch.dtype | None = None) -> Problem:
    """A norm of random samples, with random parameters: in fp32 unless another dtype is given, as mixed-precision
    training has them, or in fp64 with fp64 samples. On a GPU torch's group norm takes parameters of the samples' dtype
    only, so they have that for all."""
    words = case.chain.split("+")
    shape, dtype, channels = case.shape, case.dtype, case.shape[1]
    alike = case.op == "group_norm" and device.type == "cuda"
    parameter_dtype = parameter_dtype or (dtype if alike else torch.promote_types(dtype, torch.float32))
    random = drawer(case, device)
    arguments = {
        "input": random(dtype, *shape, scale=1.5, shift=0.3),
        "weight": random(parameter_dtype, channels, scale=0.5, shift=1.0),
        "bias": random(parameter_dtype, channels),
    }
    buffers = {}
    if "running" in words:
        running_mean = random(parameter_dtype, channels, scale=0.1)
        buffers = {
            "running_mean": running_mean,
            "running_var": random(parameter_dtype, channels).abs_().add_(0.5),
        }
    grad_output = random(dtype, *shape)
    instance = case.op == "instance_norm"
    activation = next((word for word in words if word in ACTIVATIONS), None)
    setting = Setting(channels if instance else groups_of(channels), activation, EPS, MOMENTUM)
    if activation in KINKED:
        silence_the_kink(arguments, setting, grad_output)
    for tensor in arguments.values():
        tensor.requires_grad_()
    running = (buffers.get("running_mean"), buffers.get("running_var"))

    def torch_function(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if instance:
            output = F.instance_norm(input, *running, weight, bias, True, MOMENTUM, EPS)
        else:
            output = F.group_norm(input, setting.groups, weight, bias, EPS)
        return behind(output, activation)

    def fastreg_function(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if instance:
            return functional.instance_norm(
                input, *running, weight, bias, True, MOMENTUM, EPS, activation=activation
            )
        return functional.group_norm(input, setting.groups, weight, bias, EPS, activation=activation)

    return Problem(
        op=case.op,
        arguments=arguments,
        grad_output=grad_output,
        bytes_moved=bytes_moved(
            *(grad_output.numel(), shape[0], setting.groups, channels),
            *(dtype.itemsize, parameter_dtype.itemsize),
        ),
        torch_function=torch_function,
        fastreg_function=fastreg_function,
        peers={"liger": _liger(case.op, setting, channels, device)},
        truth=lambda: exact_results(arguments, buffers, setting, grad_output),
        buffers=buffers,
        left_out=left_out(case.op, arguments["input"]),
    )


def behind(output: torch.Tensor, activation: str | None) -> torch.Tensor:
    """torch's activation of a norm's output: in place where models have it so, and backward allows it."""
    match activation:
        case None:
            return output
        case "relu":
            return output.relu_()
        case "leaky_relu":
            return F.leaky_relu(output, inplace=True)
    return ACTIVATIONS[activation](output)


def _liger(op: str, setting: Setting, channels: int, device: torch.device) -> Function | str:
    if op != "group_norm":
        return "Liger has no instance norm"
    if device.type != "cuda":
        return "Liger's kernels are Triton's and run on a GPU"
    try:
        liger = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError as error:
        return f"{error}: pip install liger-kernel"
    return lambda input, weight, bias: behind(
        liger.liger_group_norm(input, weight, bias, channels, setting.groups, EPS), setting.activation
    )
