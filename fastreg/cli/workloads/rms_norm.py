"""How RMS norm is measured: layer norm's workload without the mean and the bias."""

from __future__ import annotations

import torch

from fastreg.cli.workloads import Problem
from fastreg.cli.workloads.layer_norm import GRID, norm_problem

__all__ = ["GRID", "make_problem"]


def make_problem(
    rows: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    parameter_dtype: torch.dtype | None = None,
) -> Problem:
    """RMS norm of random rows, with a random weight (of the same dtype unless another is given)."""
    return norm_problem("rms_norm", rows, hidden_size, dtype, device, parameter_dtype or dtype)
