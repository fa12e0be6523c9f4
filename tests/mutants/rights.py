"""The right implementation of every op, by its name."""

from typing import Any

from mutants.right import RightNorm
from mutants.right_batch_norm import RightBatchNorm
from mutants.right_group_norm import RightGroupNorm

RIGHTS: dict[str, Any] = {
    "layer_norm": RightNorm,
    "rms_norm": RightNorm,
    "batch_norm": RightBatchNorm,
    "group_norm": RightGroupNorm,
    "instance_norm": RightGroupNorm,
}
