"""The modules of ``torch.nn`` with fastreg's kernels: subclasses, so that isinstance and state dicts still work."""

from fastreg.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct2d
from fastreg.nn.drop_block import DropBlock2d, DropBlock3d
from fastreg.nn.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d, DropoutAdd, DropPath
from fastreg.nn.dropout_add_layer_norm import DropoutAddLayerNorm
from fastreg.nn.dropout_add_rms_norm import DropoutAddRMSNorm
from fastreg.nn.group_norm import GroupNorm, GroupNormAct
from fastreg.nn.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from fastreg.nn.layer_norm import LayerNorm
from fastreg.nn.rms_norm import RMSNorm
from fastreg.nn.schedule import LinearSchedule
from fastreg.nn.sync_batch_norm import SyncBatchNorm, SyncBatchNormAct2d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct2d",
    "DropBlock2d",
    "DropBlock3d",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "GroupNorm",
    "GroupNormAct",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LinearSchedule",
    "RMSNorm",
    "SyncBatchNorm",
    "SyncBatchNormAct2d",
]
