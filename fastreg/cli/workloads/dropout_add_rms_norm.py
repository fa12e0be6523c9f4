"""How dropout + residual + RMS norm is measured: layer norm's workload without the mean and the bias."""

from fastreg.cli.workloads.dropout_add_layer_norm import (
    CHECKS,
    GRID,
    HOST_CHAINS,
    PEERS,
    SECONDS,
    make_problem,
)

__all__ = ["CHECKS", "GRID", "HOST_CHAINS", "PEERS", "SECONDS", "make_problem"]
