"""The modules of ``torch.nn`` with fastreg's kernels: subclasses, so that isinstance and state dicts still work."""

from fastreg.nn.layer_norm import LayerNorm
from fastreg.nn.rms_norm import RMSNorm

__all__ = ["LayerNorm", "RMSNorm"]
