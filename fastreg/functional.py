"""Every public function of fastreg, with the signatures of ``torch.nn.functional``."""

from fastreg.ops.batch_norm import batch_norm
from fastreg.ops.drop_block import drop_block2d, drop_block3d, drop_block_mask2d, drop_block_mask3d
from fastreg.ops.dropout import drop_path, dropout, dropout1d, dropout2d, dropout3d, dropout_add
from fastreg.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastreg.ops.dropout_add_rms_norm import dropout_add_rms_norm
from fastreg.ops.group_norm import group_norm
from fastreg.ops.instance_norm import instance_norm
from fastreg.ops.layer_norm import layer_norm
from fastreg.ops.rms_norm import rms_norm

__all__ = [
    "batch_norm",
    "drop_block2d",
    "drop_block3d",
    "drop_block_mask2d",
    "drop_block_mask3d",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
]
