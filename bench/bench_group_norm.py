"""Group norm: torch eager, torch.compile, every backend and Liger over the committed grid."""

from bench.harness import benchmark_of

test_group_norm = benchmark_of("group_norm")
