"""RMS norm: torch eager, torch.compile, every backend and Liger over the committed grid."""

from bench.harness import benchmark_of

test_rms_norm = benchmark_of("rms_norm")
