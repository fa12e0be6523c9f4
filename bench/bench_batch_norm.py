"""Batch norm: torch eager with and without cuDNN, torch.compile, every backend and timm over the committed grid."""

from bench.harness import benchmark_of

test_batch_norm = benchmark_of("batch_norm")
