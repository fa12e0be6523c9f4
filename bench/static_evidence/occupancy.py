"""How much of a kernel fits on a multiprocessor: NVIDIA's occupancy calculation as a pure function.

The numbers are those of the CUDA programming guide's table of compute capabilities and of cuda_occupancy.h; a test
compares the function with that header.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536
PARTITIONS = 4  # of a multiprocessor; each has a quarter of the registers, and a warp lives in one of them
REGISTERS_OF_A_WARP = 256  # a warp gets a multiple of these
REGISTERS_OF_A_THREAD = 255
THREADS_OF_A_BLOCK = 1024
SHARED_UNIT = 128
SHARED_RESERVED = 1024  # of every block, by the driver


@dataclass(frozen=True)
class Multiprocessor:
    """What one has room for."""

    warps: int
    blocks: int
    shared_bytes: int


MULTIPROCESSORS = {
    80: Multiprocessor(warps=64, blocks=32, shared_bytes=164 * 1024),
    90: Multiprocessor(warps=64, blocks=32, shared_bytes=228 * 1024),
    100: Multiprocessor(warps=64, blocks=32, shared_bytes=228 * 1024),
    120: Multiprocessor(warps=48, blocks=24, shared_bytes=100 * 1024),
}


@dataclass(frozen=True)
class Residency:
    """The blocks of one kernel that run at once on a multiprocessor.

    Attributes:
        blocks: 0 where not even one fits, and the launch fails.
        warps: of those blocks together.
        occupancy: these warps over the most that a multiprocessor can have.
        limit: what keeps more out: "warps", "blocks", "registers" or "shared memory".
    """

    blocks: int
    warps: int
    occupancy: float
    limit: str


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def residency(architecture: int, registers: int, threads: int, shared_bytes: int) -> Residency:
    """How many blocks fit.

    Args:
        architecture: 90 for compute capability 9.0.
        registers: a thread.
        threads: a block.
        shared_bytes: static and dynamic shared memory a block.

    Raises:
        ValueError: an architecture whose limits are not known here.
    """
    if architecture not in MULTIPROCESSORS:
        raise ValueError(f"the limits of sm_{architecture} are not known, only those of {[*MULTIPROCESSORS]}")
    device = MULTIPROCESSORS[architecture]
    warps = -(-threads // WARP)
    of_a_warp = _up(max(registers, 1) * WARP, REGISTERS_OF_A_WARP)
    held = REGISTERS // PARTITIONS // of_a_warp * PARTITIONS
    shared = _up(shared_bytes + SHARED_RESERVED, SHARED_UNIT)
    fitting = {
        "warps": device.warps // warps if threads <= THREADS_OF_A_BLOCK else 0,
        "registers": held // warps if registers <= REGISTERS_OF_A_THREAD else 0,
        "shared memory": device.shared_bytes // shared,
        "blocks": device.blocks,
    }
    limit = min(fitting, key=lambda name: fitting[name])
    blocks = fitting[limit]
    return Residency(blocks, blocks * warps, blocks * warps / device.warps, limit)
