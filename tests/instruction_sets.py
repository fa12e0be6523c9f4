"""The instruction sets that the CPU kernels are compiled for, and which of them this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LEVELS = ("baseline", "avx2", "avx512")


def has(level: str) -> bool:
    """What the processor is able to do, from torch rather than from the code under test."""
    from torch.backends import cpu

    order = ("DEFAULT", "AVX2", "AVX512")
    return order.index(cpu.get_cpu_capability()) >= LEVELS.index(level)


@contextmanager
def kernels_of(level: str) -> Iterator[None]:
    """The kernels of this instruction set are the ones that run in here."""
    before = torch.ops.fastreg_native.simd()
    torch.ops.fastreg_native.set_simd(level)
    try:
        assert torch.ops.fastreg_native.simd() == level
        yield
    finally:
        torch.ops.fastreg_native.set_simd(before)
