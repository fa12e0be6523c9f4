"""Every public function of fastreg, with the signatures of ``torch.nn.functional``."""

from fastreg.ops.batch_norm import batch_norm
from fastreg.ops.group_norm import group_norm
from fastreg.ops.instance_norm import instance_norm
from fastreg.ops.layer_norm import layer_norm
from fastreg.ops.rms_norm import rms_norm

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]
