"""How instance norm is measured: the layers of a style-transfer net and of a 3-D U-Net; group norm's workload.

"running" in a chain: running statistics are updated.
"""

from fastreg.cli.workloads import Point, points
from fastreg.cli.workloads._maps import LAYOUTS
from fastreg.cli.workloads.group_norm import SECONDS, make_problem

# The encoder of a style-transfer net on images of 256 x 256, and a 3-D U-Net on blocks of 64 x 64 x 64.
_STYLE = ((4, 32, 256, 256), (4, 64, 128, 128), (4, 128, 64, 64))
_VOLUMES = ((2, 32, 64, 64, 64), (2, 64, 32, 32, 32), (2, 128, 16, 16, 16), (2, 320, 8, 8, 8))


def _grid(style: tuple[tuple[int, ...], ...], volumes: tuple[tuple[int, ...], ...]) -> tuple[Point, ...]:
    return tuple(
        point
        for layout in LAYOUTS
        for chain, shapes in (("relu", style), ("leaky_relu", volumes))
        for point in points(shapes, [layout], [chain])
    )


GRID = {
    "cpu": _grid(_STYLE, _VOLUMES),
    "cuda": _grid(_STYLE, _VOLUMES),
    "rehearsal": points([(2, 8, 8, 8)], ["channels_last"], ["relu"]),
}
HOST_CHAINS = ("", "relu")
TINY = (2, 4, 2)
PEERS = ()
_MAPS = ((3, 8, 7, 7), (2, 131, 5, 3), (2, 6, 150, 217), (2, 24, 3, 5, 7))
_CHAINS = ("", "leaky_relu", "running+relu")
CHECKS = points(((3, 40, 5), (1, 3, 257), *_MAPS), ["contiguous"], _CHAINS)
CHECKS += points(_MAPS, ["channels_last"], _CHAINS)

__all__ = ["CHECKS", "GRID", "HOST_CHAINS", "PEERS", "SECONDS", "TINY", "make_problem"]
