"""Small cases and providers for the tests of the benchmark."""

from __future__ import annotations

from typing import Any

import torch

from fastreg.cli import measure, timing
from fastreg.cli.providers import EAGER, Provider
from fastreg.cli.workloads import Case, Problem

CPU = torch.device("cpu")
CHAIN = Case("batch_norm", (4, 8, 3, 5), torch.float32, "channels_last", "add+relu")
SMALL = Case("layer_norm", (5, 33), torch.float32)


def eager_and(name: str, function: Any) -> Any:
    """The providers of a problem: torch eager, and a backend of ours that computes ``function``."""

    def choose(problem: Problem) -> tuple[list[Provider], dict[str, str]]:
        eager = Provider(EAGER, problem.torch_function, peer=True)
        return [eager, Provider(name, lambda *tensors: function(problem, *tensors), peer=False)], {
            "liger": "no GPU"
        }

    return choose


def quick(
    case: Case = SMALL, function: Any = lambda problem, *tensors: problem.torch_function(*tensors)
) -> Any:
    choose = eager_and("native", function)
    return measure.measure(case, CPU, timing.CpuClock(), seconds=0, fewest=3, most=3, choose=choose)
