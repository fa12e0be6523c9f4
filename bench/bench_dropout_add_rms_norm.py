"""Dropout + residual + RMS norm: torch eager, torch.compile and every backend over the committed grid."""

from bench.harness import benchmark_of

test_dropout_add_rms_norm = benchmark_of("dropout_add_rms_norm")
