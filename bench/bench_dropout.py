"""The dropout family: torch eager, torch.compile, every backend, torchvision and timm over the committed grid."""

from bench.harness import benchmark_of

test_dropout = benchmark_of("dropout")
