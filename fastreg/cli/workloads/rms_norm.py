"""How RMS norm is measured: layer norm's workload without the mean and the bias."""

from fastreg.cli.workloads.layer_norm import CHAINS, CHECKS, GRID, LAYOUTS, PEERS, SECONDS, make_problem

__all__ = ["CHAINS", "CHECKS", "GRID", "LAYOUTS", "PEERS", "SECONDS", "make_problem"]
