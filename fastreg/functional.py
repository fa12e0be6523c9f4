"""Every public function of fastreg, with the signatures of ``torch.nn.functional``."""

from fastreg.ops.batch_norm import batch_norm
from fastreg.ops.layer_norm import layer_norm
from fastreg.ops.rms_norm import rms_norm

__all__ = ["batch_norm", "layer_norm", "rms_norm"]
