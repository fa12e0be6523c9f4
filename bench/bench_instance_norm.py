"""Instance norm: torch eager, torch.compile and every backend over the committed grid."""

from bench.harness import benchmark_of

test_instance_norm = benchmark_of("instance_norm")
