"""How batch norm is measured: the layers of ResNet-50, alone and with the residual and the ReLU that follow them.

A chain is a call of ours and as many of torch's as it takes; there the addition and the ReLU work in place, as they do
in torchvision's blocks. Its words are "add" (a residual), "relu", and "evaluation"; without the last it is a training
step, and the update of the running statistics is part of the call for everybody.
"""

from __future__ import annotations

import importlib

import torch
from torch.nn import functional as F

from fastreg import functional
from fastreg.cli.workloads import BACKWARD, BOTH, FORWARD, Case, Function, Point, Problem, points
from fastreg.cli.workloads._batch_norm_truth import Setting, exact_results, silence_the_kink
from fastreg.cli.workloads._maps import LAYOUTS, drawer, left_out

EPS = 1e-5
MOMENTUM = 0.1

# Channels and the side of the map of every distinct batch norm in a ResNet-50 on images of 224 x 224.
RESNET_50 = (
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
)


def _maps(samples: int, layers: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple((samples, channels, side, side) for channels, side in layers)


def _grid(layers: tuple[tuple[int, ...], ...], relu: tuple[tuple[int, ...], ...]) -> tuple[Point, ...]:
    """The layers alone and with what ends a block, and some of them with a ReLU only, as inside of one."""
    chains = (("", layers), ("relu", relu), ("add+relu", layers))
    return tuple(
        point for layout in LAYOUTS for chain, shapes in chains for point in points(shapes, [layout], [chain])
    )


# One layer of each size at batch 32, and at 256 three of the deeper ones: on a CPU a step of torch's chain on
# 256 x 256 x 56 x 56 takes seconds.
_CHOSEN = _maps(32, ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)))
_CHOSEN += _maps(256, ((256, 14), (1024, 14), (2048, 7)))
GRID = {
    "cpu": _grid(_CHOSEN, _CHOSEN),
    # What a quarter of an hour with a GPU has time for beside the tests.
    "cuda": _grid(_maps(256, RESNET_50), _CHOSEN[:6]),
    "rehearsal": points([(4, 16, 8, 8)], LAYOUTS, ["add+relu"]),
}
HOST_CHAINS = ("", "add+relu")
SECONDS = 3.0
PEERS = ("no_cudnn", "timm")
# Two values a channel, one plane, odd sizes on both sides of the vector widths, long planes, many channels, 2-D to 5-D.
_FLAT = ((2, 8), (65, 17), (7, 129), (3, 40, 5), (1, 3, 257))
_MAPS = ((2, 5, 1, 1), (3, 8, 7, 7), (2, 131, 5, 3), (2, 3, 150, 217), (16, 64, 14, 14), (2, 24, 3, 5, 7))
_CHAINS = ("", "relu", "add+relu", "evaluation", "evaluation+add+relu")
CHECKS = points((*_FLAT, *_MAPS), ["contiguous"], _CHAINS) + points(_MAPS, ["channels_last"], _CHAINS)


def bytes_moved(
    elements: int, channels: int, element: int, parameter_element: int, residual: bool
) -> dict[str, int]:
    """Minimum traffic in bytes of a training step: every tensor read or written once a direction.

    That is what can be reached where a slab of channels stays on chip: 2 passes over an activation forward and 3
    backward, each one more with a residual, which is read forward and whose gradient is written backward. A kernel
    that reads the input a second time moves more than is counted for it here, and what ReLU after a residual keeps for
    backward, a bit an element, is not counted either. So no figure flatters a kernel, whatever the shape.

    Args:
        elements, channels: of the input.
        element, parameter_element: bytes an element of the activations and of the parameters.
    """
    activation = elements * element
    statistics = 2 * channels * max(4, element)
    parameters = 2 * channels * parameter_element
    passes = 3 if residual else 2
    # The running statistics are read and written.
    forward = passes * activation + statistics + 3 * parameters
    backward = (passes + 1) * activation + statistics + 2 * parameters
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def make_problem(case: Case, device: torch.device, parameter_dtype: torch.dtype | None = None) -> Problem:
    """Batch norm of random samples, with random parameters: in fp32 unless another dtype is given, as mixed-precision
    training has them, or in fp64 with fp64 samples."""
    words = case.chain.split("+")
    shape, dtype, channels = case.shape, case.dtype, case.shape[1]
    parameter_dtype = parameter_dtype or torch.promote_types(dtype, torch.float32)
    random = drawer(case, device)
    arguments = {
        "input": random(dtype, *shape, scale=1.5, shift=0.3),
        "weight": random(parameter_dtype, channels, scale=0.5, shift=1.0),
        "bias": random(parameter_dtype, channels),
    }
    if "add" in words:
        arguments["residual"] = random(dtype, *shape)
    running_mean = random(parameter_dtype, channels, scale=0.1)
    running_var = random(parameter_dtype, channels).abs_().add_(0.5)
    buffers = {"running_mean": running_mean, "running_var": running_var}
    grad_output = random(dtype, *shape)
    activated = "relu" in words
    setting = Setting("evaluation" not in words, activated, MOMENTUM, EPS)
    if activated:
        silence_the_kink(arguments, buffers, setting, grad_output)
    for tensor in arguments.values():
        tensor.requires_grad_()

    def torch_function(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        output = F.batch_norm(input, running_mean, running_var, weight, bias, setting.training, MOMENTUM, EPS)
        if residual is not None:
            output += residual
        return output.relu_() if activated else output

    def fastreg_function(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        return functional.batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            setting.training,
            MOMENTUM,
            EPS,
            residual=residual,
            activation="relu" if activated else None,
        )

    return Problem(
        op=case.op,
        arguments=arguments,
        grad_output=grad_output,
        bytes_moved=bytes_moved(
            grad_output.numel(), channels, dtype.itemsize, parameter_dtype.itemsize, "add" in words
        ),
        torch_function=torch_function,
        fastreg_function=fastreg_function,
        peers={
            "no_cudnn": _without_cudnn(torch_function, device),
            "timm": _timm(case.chain, arguments, buffers),
        },
        truth=lambda: exact_results(arguments, buffers, setting, grad_output),
        buffers=buffers,
        left_out=left_out(case.op, arguments["input"]),
    )


def _without_cudnn(torch_function: Function, device: torch.device) -> Function | str:
    """Torch's own kernels on a GPU, where its eager batch norm is cuDNN's."""
    if device.type != "cuda":
        return "there is no cuDNN on a CPU to be left out: torch eager is torch's own kernels"

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return torch_function(*tensors)

    return function


def _timm(chain: str, arguments: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> Function | str:
    """timm's layer, made of the problem's own tensors."""
    if chain != "relu":
        return "timm's BatchNormAct2d adds no residual, and without its activation it is torch's batch norm"
    try:
        layers = importlib.import_module("timm.layers")
    except ImportError as error:
        return f"{error}: pip install timm"
    module = layers.BatchNormAct2d(
        arguments["input"].shape[1], eps=EPS, momentum=MOMENTUM, act_layer=torch.nn.ReLU
    )
    for name in ("weight", "bias"):
        delattr(module, name)
        setattr(module, name, arguments[name])
    for name, tensor in buffers.items():
        setattr(module, name, tensor)
    return lambda input, weight, bias: module(input)
