"""DropBlock: torch eager, torch.compile, every backend, torchvision and timm over the committed grid."""

from bench.harness import benchmark_of

test_drop_block = benchmark_of("drop_block")
