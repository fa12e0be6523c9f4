"""Who is measured: torch eager, torch.compile, every fastreg backend, and other libraries where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fastreg import backends
from fastreg.cli.workloads import Function, Problem

EAGER, COMPILE = "eager", "compile"

LABELS = {
    EAGER: "torch eager",
    COMPILE: "torch.compile",
    "liger": "Liger",
    "no_cudnn": "torch eager without cuDNN",
    "timm": "timm",
    "torchvision": "torchvision",
}


def label(name: str) -> str:
    """What a table calls a provider."""
    return LABELS.get(name, f"fastreg {name}")


@dataclass(frozen=True)
class Provider:
    """One implementation of a problem's op.

    Attributes:
        name: its key in results.
        function: takes the problem's arguments.
        peer: not fastreg's.
        context: entered, untimed, around its calls.
    """

    name: str
    function: Function
    peer: bool
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def compiled(problem: Problem) -> Function:
    """torch.compile of torch's function for this shape alone, as a user with static shapes would have it."""
    # A fresh start for every problem: after a few shapes of one function dynamo would give up and run it eagerly.
    torch.compiler.reset()
    function: Function = torch.compile(problem.torch_function, dynamic=False)
    return function


def _backend(name: str, problem: Problem) -> Provider:
    return Provider(name, problem.fastreg_function, peer=False, context=lambda: backends.use(name))


def interpreted(name: str, device: torch.device) -> bool:
    """Whether a backend runs only under an interpreter here: fit for checks, not for timing."""
    return name == "triton" and device.type == "cpu"


def providers_for(problem: Problem) -> tuple[list[Provider], dict[str, str]]:
    """The providers that can run a problem, and the others with the reason why not."""
    input = problem.input
    found = [
        Provider(EAGER, problem.torch_function, peer=True),
        Provider(COMPILE, compiled(problem), peer=True),
    ]
    missing: dict[str, str] = {}
    for name in backends.NAMES:
        reason = backends.unavailable(name, problem.op, input.device.type, input.dtype)
        if reason is None and interpreted(name, input.device):
            reason = "runs in Triton's interpreter on the CPU, which is for tests"
        if reason is None:
            found.append(_backend(name, problem))
        else:
            missing[name] = reason
    for name, function in problem.peers.items():
        if isinstance(function, str):
            missing[name] = function
        else:
            found.append(Provider(name, function, peer=True))
    found = [provider for provider in found if provider.name not in problem.left_out]
    return found, {**missing, **problem.left_out}
