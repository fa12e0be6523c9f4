"""Every public function of fastreg, with the signatures of ``torch.nn.functional``."""

from fastreg.ops.layer_norm import layer_norm
from fastreg.ops.rms_norm import rms_norm

__all__ = ["layer_norm", "rms_norm"]
